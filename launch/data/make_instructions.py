"""Write instructions.jsonl beside this file: about 1200 short questions with answers, the same on every machine.

The tasks are small enough for a model of a few hundred thousand parameters to learn within minutes on two CPU cores.
Nothing is drawn at random: rows are chosen and ordered by a hash of the question. Usage: python make_instructions.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).with_name("instructions.jsonl")
ROWS_PER_TASK = 80

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = (
    "ant arm bag bed bee bird boat book box bus cake cap car cat cow cup day desk dog door duck ear egg eye fan farm "
    "fish flag fox frog game goat hand hat hen hill ink jar key king kite lamp leaf lion map milk moon nest nut owl "
    "park pen pig pond rain ring road rose sand ship sky snow sock star sun tent tree van wind wolf yard zoo"
).split()
OPPOSITES = (
    "hot cold,big small,up down,left right,day night,open closed,fast slow,wet dry,modern ancient,hard soft,high low,"
    "rich poor,full empty,early late,in out,on off,near far,happy sad,light dark,strong weak,first last,good bad,"
    "long short,clean dirty,loud quiet,thick thin,wide narrow,young old,love hate,start stop,push pull,win lose,"
    "above below,inside outside,always never,true false,easy difficult,cheap expensive,sweet sour,before after"
)
PLURALS = (
    "baby babies,box boxes,bus buses,child children,city cities,class classes,dish dishes,foot feet,fox foxes,"
    "fish fish,goose geese,knife knives,leaf leaves,lady ladies,man men,mouse mice,sky skies,story stories,"
    "tooth teeth,watch watches,wolf wolves,woman women"
)
PASTS = (
    "walk walked,talk talked,jump jumped,play played,look looked,help helped,ask asked,work worked,call called,"
    "open opened,close closed,go went,see saw,eat ate,run ran,sing sang,take took,give gave,write wrote,come came,"
    "buy bought,think thought,make made,say said,find found,keep kept,know knew,sleep slept,swim swam,speak spoke"
)
UNCOUNTABLE = {"ink", "milk", "rain", "sand", "snow"}
COLOURS = (
    "grass green,snow white,coal black,blood red,a lemon yellow,the sky blue,a carrot orange,milk white,a frog green,"
    "a banana yellow,a tomato red,chocolate brown,a crow black,a plum purple,a flamingo pink,a polar bear white"
)
SOUNDS = "cat meows,dog barks,cow moos,duck quacks,lion roars,sheep bleats,bee buzzes,snake hisses,wolf howls"
YOUNG = "cat kitten,dog puppy,cow calf,sheep lamb,horse foal,hen chick,goat kid,bear cub,frog tadpole,goose gosling"
UNITS = (
    ("minutes", "hours", 60), ("seconds", "minutes", 60), ("days", "weeks", 7), ("months", "years", 12),
    ("centimetres", "metres", 100), ("grams", "kilograms", 1000), ("hours", "days", 24), ("eggs", "dozens", 12),
)  # fmt: skip

Pair = tuple[str, str]


def pairs(text: str) -> list[Pair]:
    """Read "key value,key value" with values of one word."""
    return [(pair.rsplit(" ", 1)[0], pair.rsplit(" ", 1)[1]) for pair in text.split(",")]


def calendar() -> Iterator[Pair]:
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for index, name in enumerate(names):
            following = names[(index + 1) % len(names)]
            yield f"What {kind} comes after {name}?", following
            yield f"Which {kind} follows {name}?", following
            yield f"What {kind} comes before {following}?", name


def meanings() -> Iterator[Pair]:
    for one, other in pairs(OPPOSITES):
        yield f"What is the opposite of {one}?", other
        yield f"What is the opposite of {other}?", one


def plurals() -> Iterator[Pair]:
    known = dict(pairs(PLURALS))
    for word in sorted({*WORDS, *known} - UNCOUNTABLE):
        yield f"What is the plural of {word}?", known.get(word, f"{word}s")


def pasts() -> Iterator[Pair]:
    for verb, past in pairs(PASTS):
        yield f"What is the past tense of {verb}?", past
        yield f"Today I {verb}. Yesterday I ...", past


def facts() -> Iterator[Pair]:
    for thing, colour in pairs(COLOURS):
        yield f"What colour is {thing}?", colour
    for animal, sound in pairs(SOUNDS):
        yield f"What does a {animal} do?", f"It {sound}."
    for animal, child in pairs(YOUNG):
        yield f"What is a young {animal} called?", f"A {child}."


def units() -> Iterator[Pair]:
    for small, large, factor in UNITS:
        for count in range(2, 10):
            yield f"How many {small} are in {count} {large}?", f"{count * factor} {small}"


def sums() -> Iterator[Pair]:
    for a in range(10):
        for b in range(10):
            yield f"What is {a} + {b}?", str(a + b)


def differences() -> Iterator[Pair]:
    for a in range(14):
        for b in range(a + 1):
            yield f"What is {a} - {b}?", str(a - b)


def counting() -> Iterator[Pair]:
    for number in range(1, 100):
        yield f"What number comes after {number}?", str(number + 1)


def parity() -> Iterator[Pair]:
    for number in range(1, 100):
        yield f"Is {number} even or odd?", "odd" if number % 2 else "even"


def comparisons() -> Iterator[Pair]:
    for a in range(10, 100, 7):
        for b in range(13, 100, 9):
            if a != b:
                yield f"Which is larger, {a} or {b}?", str(max(a, b))


def alphabet() -> Iterator[Pair]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    for one, following in zip(letters, letters[1:], strict=False):
        yield f"What letter comes after {one}?", following
        yield f"What letter comes before {following}?", one
        yield f"Write the letter {one} as a capital.", one.upper()


def copies() -> Iterator[Pair]:
    for word in WORDS:
        yield f"Repeat the word {word}.", word


def capitals() -> Iterator[Pair]:
    for word in WORDS:
        yield f"Write {word} in capital letters.", word.upper()


def reversals() -> Iterator[Pair]:
    for word in WORDS:
        yield f"Spell {word} backwards.", word[::-1]


def first_letters() -> Iterator[Pair]:
    for word in WORDS:
        yield f"What is the first letter of {word}?", word[0]


def last_letters() -> Iterator[Pair]:
    for word in WORDS:
        yield f"What is the last letter of {word}?", word[-1]


def lengths() -> Iterator[Pair]:
    for word in WORDS:
        yield f"How many letters are in {word}?", str(len(word))


TASKS = (
    calendar, meanings, plurals, pasts, facts, units, sums, differences, counting, parity, comparisons, alphabet,
    copies, capitals, reversals, first_letters, last_letters, lengths,
)  # fmt: skip


def by_hash(pair: Pair) -> str:
    return hashlib.sha256(pair[0].encode()).hexdigest()


def rows() -> list[dict[str, str]]:
    """Return all rows in their final order. No question is repeated: evaluation and training share none."""
    chosen = [pair for task in TASKS for pair in sorted(dict(task()).items(), key=by_hash)[:ROWS_PER_TASK]]
    return [{"question": question, "answer": answer} for question, answer in sorted(dict(chosen).items(), key=by_hash)]


def text() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8", newline="\n")
    print(f"{len(rows())} rows in {PATH}")
