"""docs/troubleshooting.md quotes what the program says, and explains every refusal."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import trainer
from tests.docs.pages import ROOT
from tests.docs.refusals import GAP, MIN_WORDS, Refusal, num_words, refusals

PACKAGE = Path(trainer.__file__).parent

# What the page need not explain: where it is (a module, or a function in it) or how it begins, and why.
EXEMPT = {
    # Kinds of values and texts, which are put into messages that the page explains.
    "trainer/config/keys.py": "what is allowed for a key: the schema's own words, after `got ...; allowed:`",
    "trainer/config/sources.py": "what is allowed for `format`",
    "a Hugging Face folder, or a hub name": "what is allowed for `model.path`",
    "0 or more, finite": "what is allowed for keys of an update rule",
    "trainer/data/formats/conversations.py, _call_in_value": "what is needed, after `but`",
    "trainer/data/formats/conversations.py, _tools": "what is needed, after `but`",
    "trainer/data/tokenizer.py, _advice": "the advice at the end of messages about a tokenizer",
    "trainer/data/cache.py, _settings": "what else samples depend on, before `is not the same as in the checkpoint`",
    "trainer/data/order.py, _change": "a value that is missing, before `in the checkpoint`",
    "(with ..., and then with ...)": "versions of transformers, after `this is not the model that the run began with`",
    "..., and the vocabulary of ... is smaller than": "why a loss is not fused: a line of a plan",
    "all of it": "the reason of an error of the file system that has none",
    "the LR scheduler's state_dict()": "what cannot be saved",
    "trainer/engine/zero/private_names.py": "which private names DeepSpeed lacks",
    # Caught, and said in another way.
    "trainer/data/strict_json.py, items": "why a list of JSON is read again, as a whole, to name line and column",
    "step ... is below 0": "inside `contains a state that does not fit this run`",
    "... is not a JSON object": "inside `is not a complete model`",
    "trainer/export/published.py": "why a published file is not copied: a notice of an export",
    "trainer/planner/tracing.py, _capture": "why a plan has no activations: a note in it",
    # No refusals: what is printed beside them, or by functions that share their name with others.
    "trainer/cli/main.py": "the list of commands",
    "What a single rank would do": "what `train --dry-run` prints without a launcher",
    "what changed up to": "what `export` prints at its end",
    "trainer/config/command_line.py, _introduction": "the help of `train`",
    "trainer/data/formats/alpaca.py": "the prompts of Alpaca",
    "trainer/data/order.py, not_recorded": "a notice when a run of an earlier version resumes",
    "... contains a run with other settings (...) and no checkpoint": "a notice before a run starts anew",
    "...: its settings are those of its newest checkpoint": "a notice when a run resumes",
    "; resume=... resumes from it": "the end of a sentence about a finished run",
    "trainer/run/resuming.py, changed": "a notice when a run resumes",
    "trainer/run/training_record.py, resume": "a notice when a run resumes",
    "trainer/run/progress.py, step": "the line of a step",
    "trainer/data/progress.py": "the line of tokenising",
    "trainer/cli/prepare.py, main": "what control-C leaves",
    "trainer/run/remarks.py": "the lines before and after a run",
    "trainer/planner/advice.py": "what a change of a plan costs",
    "trainer/planner/passes.py, outside": "a row of a plan",
    "trainer/planner/report.py": "the lines of a plan",
    "trainer/planner/watch.py": "the lines of a plan, and of the memory measured",
    "trainer/updates/base.py": "a row of a plan",
    "trainer/updates/unmask.py, footprint": "a row of a plan",
}


def quotes() -> list[str]:
    """Return the messages at the top of the entries. A value is `...`."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return [quote for line in re.findall(r"^> (.+)", text, re.MULTILINE) for quote in re.findall("`([^`]+)`", line)]


@cache
def _pieces(text: str) -> tuple[str, ...]:
    """Return what a text says between its values, without quotes, braces and punctuation around it."""
    pieces = (piece.strip(" ;:,.()'\"{}[]\n") for piece in re.split(rf"\.{{3,}}|{GAP}", text))
    return tuple(piece for piece in pieces if piece)


def _contains(whole: str, part: str) -> bool:
    """Return whether `whole` has all pieces of `part`, in order."""
    end = 0
    for piece in _pieces(part):
        start = whole.find(piece, end)
        if start < 0:
            return False
        end = start + len(piece)
    return True


def explains(quote: str, refusal: Refusal) -> bool:
    """Return whether a quote is of a refusal: it has all of its words, or no others and not only common ones."""
    return _contains(quote, refusal.text) or (_contains(refusal.text, quote) and num_words(quote) > MIN_WORDS)


def _exempts(key: str, refusal: Refusal) -> bool:
    return refusal.place.startswith(key) or refusal.text.strip().replace(GAP, "...").startswith(key)


def unexplained(found: set[Refusal]) -> list[str]:
    known = quotes()
    left = [refusal for refusal in found if not any(_exempts(key, refusal) for key in EXEMPT)]
    return sorted(str(refusal) for refusal in left if not any(explains(quote, refusal) for quote in known))


def test_every_refusal_is_explained() -> None:
    assert unexplained(refusals(PACKAGE)) == []


def test_exemptions_are_needed() -> None:
    """Each is of something that there is, and that the page does not explain."""
    found, known = refusals(PACKAGE), quotes()
    left = [refusal for refusal in found if not any(explains(quote, refusal) for quote in known)]
    assert [key for key in EXEMPT if not any(_exempts(key, refusal) for refusal in left)] == []


MODULE = """
from elsewhere import TABLE

REASONS = {"key": "a reason that a table gives"}


def check(values, parser):
    problems = []
    if values:
        problems.append(f"key: got {values}, which is no number")
    problems += [f"key: {line}" for line in _look(values)]
    try:
        require("the first thing to do")
    except OSError as error:
        raise DataError([f"{REASONS[values]}"]) from error
    if problems:
        raise ConfigError(problems)
    parser.error("argument --key: this is not a number")
    print(f"{values} is not what it was", file=sys.stderr)
    print("the picture of this run is drawn")
    assert values, "this cannot happen at all"


def _look(values):
    \"\"\"Describe what is not said to a user.\"\"\"
    if values:
        yield "some of the values are odd"
    return "this value is " + ("below all others" if values else "above all others")


def require(what):
    if not what:
        raise AssertionError("this is a mistake in here")
    raise StrataError(f"{what}: {why(what)}")


def why(text):
    reason = f"there is no room for {text}"
    return reason
"""


def test_refusals_are_found_wherever_their_words_are(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    assert {refusal.text.replace(GAP, "...") for refusal in refusals(tmp_path)} == {
        "a reason that a table gives",
        "key: got ..., which is no number",
        "some of the values are odd",
        "this value is ",
        "below all others",
        "above all others",
        "the first thing to do",
        "there is no room for ...",
        "argument --key: this is not a number",
        "... is not what it was",
    }


def _spoken() -> str:
    """All text in the sources of the package, with a gap where a message has a value."""
    said = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    said.append((ROOT / "launch" / "slurm.sbatch").read_text())
    return "\n\n".join(said)


def test_quotes_are_of_messages_that_exist() -> None:
    spoken = _spoken()
    assert len(quotes()) >= 30
    # Messages are put together at punctuation, so each piece is looked for alone.
    assert [(piece, quote) for quote in quotes() for piece in _pieces(quote) if piece not in spoken] == []
