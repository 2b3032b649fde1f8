"""The converted model: its tokenizer is exact, and stock vLLM and transformers agree on every greedy token of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engines import engine

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

NUM_TOKENS = 48
# question, and a word that any sane answer has
QUESTIONS = [
    ("What is the capital of France?", "Paris"),
    ("What is 2 + 2? Answer with a number.", "4"),
    ("Name the planet on which we live.", "Earth"),
    ("Write one sentence about a cat.", "cat"),
    ("What colour is the sky on a clear day?", "blue"),
]


def chat_prompts(tokenizer) -> list[list[int]]:
    """The questions as token ids, through the model's own chat template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _ in QUESTIONS
    ]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize(
    "text",
    [
        "in 2024 we paid 3.50",
        "two  spaces,   three\n\n\tand a tab ",
        "  7  8   9",
        "naïve café, 東京, 🦙",
        "f(x)=x**2  # 10 + 1",
    ],
)
def test_tokenizer_returns_the_text_it_was_given(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_one_token_after_a_single_space(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024  5")) == [
        "in", "Ġ", "2", "0", "2", "4", "ĠĠ", "5",
    ]  # fmt: skip


def test_chat_template_opens_the_assistants_turn(tokenizer) -> None:
    text = tokenizer.decode(chat_prompts(tokenizer)[0])
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")


def test_vllm_and_transformers_choose_the_same_greedy_tokens(tokenizer, smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    prompts = chat_prompts(tokenizer)
    # float32: in bf16 the two round differently, and near-ties between tokens go either way.
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(tokens[0, len(prompt) :].tolist())
    del model

    with engine(smollm2, dtype="float32", max_model_len=512) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    # Ends of answers come from generation_config.json; without it the model would run on to NUM_TOKENS.
    assert any(tokens[-1] == tokenizer.eos_token_id for tokens in expected)
    for (question, word), output in zip(QUESTIONS, outputs, strict=True):
        assert word in output.outputs[0].text, question
