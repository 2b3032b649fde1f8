from vllm_defensive_kernels.learned import Rotation
class Rotations:
    def __init__(self, model, names, head_size, turned=None):
        self.r=[Rotation(model.get_submodule(n.rpartition(".")[0]).rotary_emb.cos_sin_cache) for n in names]
    def of(self, layer): return self.r[layer]
