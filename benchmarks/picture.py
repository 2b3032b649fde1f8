"""`python -m benchmarks.picture`: evict a prompt with a fact inside, and draw what was kept (`docs/eviction.png`).

Needs a Chromium for the image; the page itself is left beside it as `eviction.html`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.documents import make_question
from benchmarks.models import ensure_model
from benchmarks.quality.engine import Engine, Setting

SIZE = "1240,1170"  # all of a prompt of 800 tokens
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def chromium(page: Path, *arguments: str) -> str:
    """What a Chromium without a window prints of a page, once its script has run."""
    program = browser()
    if program is None:
        raise SystemExit(f"no {', '.join(BROWSERS)} in PATH: install one of them, or open {page} yourself")
    with tempfile.TemporaryDirectory() as profile:
        # Without a sandbox, since that cannot start as root or in many containers; the page is ours and loads nothing.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        options += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--hide-scrollbars", *arguments]
        done = subprocess.run(
            [program, *options, page.resolve().as_uri()], capture_output=True, text=True, check=True, timeout=240
        )
    return done.stdout


def shrink(image: Path) -> None:
    """To a palette: a quarter of the bytes, and nothing of it that one could see."""
    from PIL import Image

    with Image.open(image) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(image, optimize=True)


def audit_of_question(folder: Path, tokens: int, policy: str, keep: float) -> Path:
    """The audit file of one question that the small model answers; prints question and answer."""
    engine = Engine(ensure_model(), audit=str(folder), max_model_len=4096)
    question = make_question(3, tokens, lambda text: len(engine.encode(text)))
    prompt = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": question.prompt}], add_generation_prompt=True, return_dict=False
    )
    (output,) = engine.free([(prompt, 32, Setting(policy, keep))])
    print(f"{question.question}\n{output.outputs[0].text.strip()} (right: {question.answer})")
    (file,) = folder.glob("*.safetensors")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/eviction.png"), help="default: %(default)s")
    parser.add_argument("--policy", default="halokv", help="default: %(default)s")
    parser.add_argument("--keep", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=800, help="of the prompt, about; default: %(default)s")
    parser.add_argument("--dark", action="store_true", help="as a dark desktop shows it")
    chosen = parser.parse_args()
    from vllm_defensive import audit

    page = chosen.out.with_suffix(".html")
    with tempfile.TemporaryDirectory() as folder:
        file = audit_of_question(Path(folder), chosen.tokens, chosen.policy, chosen.keep)
        audit.main(["show", str(file), "--html", str(page), "--tokenizer", str(ensure_model())])
    dark = ["--blink-settings=preferredColorScheme=0"] if chosen.dark else []
    chromium(page, f"--screenshot={chosen.out.resolve()}", f"--window-size={SIZE}", *dark)
    shrink(chosen.out)
    print(f"{chosen.out}: {chosen.out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
