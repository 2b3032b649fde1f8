"""What every worker of ours adds to vLLM's, whatever the device: it is told what to keep, evicts after the forward
pass, and reports what that took."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.v1.worker.gpu_worker import Worker

from vllm_defensive import learned
from vllm_defensive.compat import channels, contract
from vllm_defensive.engine.spec import evictable_specs
from vllm_defensive.limits import check_layers, evictable_group, has_states, of_one_size
from vllm_defensive.packing import MANY_BLOCKS
from vllm_defensive.policy import PRESETS, ReduceHeads
from vllm_defensive.settings.engine import from_vllm_config
from vllm_defensive.worker.evictor import Evictor, logger
from vllm_defensive.worker.forced import FORCED
from vllm_defensive.worker.learned import LearnedWeights, Lessons
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.rotation import RotaryWatch, RotationError, Rotations
from vllm_defensive.worker.runtime import Runtime
from vllm_defensive_kernels.learned import Rotation

_OTHER_BLOCKS = "off (not all layers have blocks of one size)"


def _forgetting(name: str, *, same: bool = False) -> Any:
    """vLLM's method of that name, which may change the model's weights; what was derived from them is forgotten. same:
    they are elsewhere for a while, and come back as they were."""

    def method(self: EvictionWorker, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(EvictionWorker, self), name)(*args, **kwargs)
        finally:
            if self._evictor is not None:
                self._evictor.forget_weights(same=same)

    return method


class EvictionWorker(Worker):
    """Base of our workers; vLLM's CPU worker and its GPU worker are both `Worker`s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        contract.require(*contract.worker_sides())
        super().__init__(*args, **kwargs)
        config = from_vllm_config(self.vllm_config)
        assert config is not None
        self.eviction = config
        self._runtime: Runtime | None = None
        self._evictor: Evictor | None = None
        self._watch: RotaryWatch | None = None

    @property
    def tensor_rank(self) -> tuple[int, int]:
        """(this worker's tensor-parallel rank, their number)."""
        return self.rank, self.parallel_config.tensor_parallel_size

    @property
    def reduce_heads(self) -> ReduceHeads | None:
        """Sums a tensor over the ranks that share each layer's heads (it may be overwritten); None if there is one."""
        return tensor_model_parallel_all_reduce if self.parallel_config.tensor_parallel_size > 1 else None

    reload_weights = _forgetting("reload_weights")
    update_weights = _forgetting("update_weights")
    finish_weight_update = _forgetting("finish_weight_update")
    reset_weights = _forgetting("reset_weights")
    sleep = _forgetting("sleep", same=True)
    wake_up = _forgetting("wake_up", same=True)
    apply_model = _forgetting("apply_model")  # a function of the user's own, which may load weights

    @abstractmethod
    def start_eviction(
        self, group: int, readers: Readers, names: list[str], layers: list[Any]
    ) -> tuple[Runtime, Evictor]:
        """Make the per-device parts and hand them to the attention layers and metadata builders of a KV cache group.

        group: its index. names, layers: all that read its caches, which are allocated, and their names in the model.
        """

    # Rows of a page, where vLLM makes blocks as large as the states of recurrent layers; None: as many as a block has.
    page_tokens: int | None = None

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """The layers' specs, those of evictable layers as `EvictableSpec`."""
        return evictable_specs(
            super().get_kv_cache_spec(),
            self.eviction,
            self.model_config.max_model_len,
            self.cache_config.block_size,
            self.page_tokens,
        )

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache, then start eviction on the group that can be evicted."""
        super().initialize_from_config(kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        group = evictable_group(groups)
        spec, context = groups[group].kv_cache_spec, self.vllm_config.compilation_config.static_forward_context
        readers, names = Readers.find(groups[group].layer_names, context)
        layers = [context[name] for name in names]
        check_layers(names, layers)
        self._runtime, self._evictor = self.start_eviction(group, readers, names, layers)
        names, layers = ([each[reader] for reader in readers.own] for each in (names, layers))
        self._attention_names, self._attention_layers = names, layers
        if any(PRESETS[policy].learned for policy in self.eviction.served):
            self.load_learned()
        logger.info(
            "KV eviction is on: policy %s keeps %g of each prompt of %d tokens or more (window %d)%s, in widths %s, "
            "reuse %s; pages of %d tokens, %d layers x %d KV heads, %d pages a block",
            self.eviction.described,
            self.eviction.keep,
            self.eviction.min_tokens,
            self.eviction.window,
            ", and all as long as there is memory" if self.eviction.when == "full" else "",
            self.eviction.described_widths,
            self.eviction.reuse if of_one_size(groups) or self.eviction.reuse == "off" else _OTHER_BLOCKS,
            spec.page.rows,
            len(names),
            spec.num_kv_heads,
            len(names) * spec.num_kv_heads * spec.block_size // spec.page.rows,
        )
        if has_states(groups):
            told = "; no prompt is repeated, and who would be scored by that is scored by its window"
            logger.info(
                "KV eviction: %d of %d layers are evicted, those of full attention. A block is as large as a state of "
                "the others, %d tokens, and budgets are whole blocks: prompts below %d tokens gain little%s",
                len(names),
                sum(len(group.layer_names) for group in groups),
                spec.block_size,
                MANY_BLOCKS * spec.block_size,
                told if self.eviction.reconstructs else "",
            )

    def load_learned(self, path: str | None = None) -> None:
        """Go by this learned score from now on, or by the engine's own, read again: after new weights, say.

        Raises ValueError if it is none, or for layers, heads or positions of another kind.
        """
        path = self.eviction.score_file if path is None else path
        if path is None:
            return  # while the first one is being learned
        assert self._evictor is not None
        score, first, (rank, ranks) = learned.load(path), self._attention_layers[0], self.tensor_rank
        heads = first.num_kv_heads
        learned.check_shape(score, path, len(self._attention_layers), ranks * heads, first.head_size)
        rotations, own = self._rotations(score.facts.turned), slice(rank * heads, (rank + 1) * heads)
        longest = self.model_config.max_model_len
        positions = min((len(r.table_PR) for r in rotations if r is not None), default=longest)
        if positions < longest:
            raise ValueError(
                f"max_model_len={longest}: RoPE has a table for {positions} positions, and a learned score goes by it; "
                "choose no more, or --kv-eviction-learned none"
            )
        self._evictor.go_by(LearnedWeights(score, rotations, own, first.kv_cache.device))
        told = {name: value for name, value in learned.summary(score, path).items() if name != "checks"}
        logger.info("KV eviction goes by a learned score: %s", ", ".join(f"{k} {v}" for k, v in told.items()))

    def _rotations(self, turned: Sequence[bool] | None) -> list[Rotation | None]:
        names, layers = self._attention_names, self._attention_layers
        found = Rotations(self.model_runner.get_model(), names, layers[0].head_size, turned)
        return [found.of(layer) for layer in range(len(names))]

    # -- called by `python -m vllm_defensive.learn`, on every rank -----------------------------------------------------

    def watch_rotation(self) -> str | None:
        """From now on it is seen which layers turn their keys. Returns why the model's keys cannot be had, or None."""
        try:
            self._watch = RotaryWatch(self.model_runner.get_model(), self._attention_names)
        except RotationError as error:
            return str(error)
        return None

    def start_learning(self, sums: str | None = None) -> list[bool] | str:
        """From now on each second look is learned from, beside what is in this file of `save_lessons`.

        Call `watch_rotation` first, and run a prompt. Returns which layers turn their keys, or why not.
        """
        assert self._evictor is not None and self._watch is not None
        with self._watch:
            turned = self._watch.turned()
        first = self._attention_layers[0]
        try:
            rotations = self._rotations(turned)
        except RotationError as error:
            return str(error)
        lessons = Lessons(len(rotations), first.num_kv_heads, first.head_size, rotations)
        if sums is not None:
            try:
                lessons.load(self._own(sums))
            except (OSError, SafetensorError) as error:
                return f"what was summed so far cannot be read ({error}); remove {Path(sums).parent} to begin anew"
        self._evictor.lessons = lessons
        return turned

    def hold_back(self, held_back: bool) -> None:
        """Whether what comes is only compared with."""
        self._lessons.held_back = held_back

    def save_lessons(self, sums: str) -> None:
        """Write this rank's sums into its file of this name. Raises OSError."""
        self._lessons.save(self._own(sums))

    def end_learning(self) -> float:
        """Nothing is learned from any more. Returns the balance that follows from the texts which were evicted by both
        scores, this one's and the window's."""
        assert self._evictor is not None
        balance, self._evictor.lessons = self._lessons.balance, None
        return balance

    def set_balance(self, balance: float) -> None:
        """Of the learned score that is loaded."""
        assert self._evictor is not None and self._evictor.learned is not None
        self._evictor.learned.balance = balance

    def learned_so_far(self) -> bytes:
        """What follows from the texts so far, as a safetensors file: weight_LHX and r2_LH, of this rank's heads, and
        how many tokens were learned from."""
        weight_LHX, r2_LH = self._lessons.solve()
        return save({"weight_LHX": weight_LHX, "r2_LH": r2_LH, "tokens": torch.tensor(self._lessons.tokens)})

    def take_divergences(self) -> dict[str, list[float]]:
        """See `Forced.take`. Empty on ranks that do not sample."""
        return FORCED.take()

    @property
    def _lessons(self) -> Lessons:
        assert self._evictor is not None and self._evictor.lessons is not None
        return self._evictor.lessons

    def _own(self, sums: str) -> str:
        return f"{sums}.rank{self.tensor_rank[0]}.safetensors"

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """One step, and the evictions that are due after it."""
        if self._runtime is None or self._evictor is None:
            return super().execute_model(scheduler_output)
        message = channels.read_message(scheduler_output)
        gone = channels.reset_requests(scheduler_output)
        self._runtime.begin(message, gone)
        self._evictor.forget(gone, message.forgotten)
        self._evictor.adopt(message.adopted)
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._runtime.end()
        self._evictor.run(message.scores, message.evictions)
        self._runtime.drop_untaken()
        return self._report(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with a report of evictions on its output."""
        return self._report(super().sample_tokens(*args, **kwargs))

    def _report(self, output: Any) -> Any:
        # vLLM answers steps without tokens with one shared object, on which a report would stay for ever.
        if output is not None and self._evictor is not None and not channels.is_shared_output(output):
            channels.attach_report(output, self._evictor.take_report())
        return output
