"""The commands, links and settings that README.md and the other pages name, read out of their Markdown."""

import re
import shlex
from dataclasses import dataclass

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "results" / "README.md",
]
PROGRAMS = "bash|python3?|pip|uv|make|source|hf|sbatch|accelerate|git|chromium"
ASSIGNMENT = r"[A-Z_]+=(?:\"[^\"]*\"|'[^']*'|[^\s;\"']*)"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SEPARATORS = {"&&", ";", "|"}


@dataclass(frozen=True)
class Command:
    """What a user would paste; `before`: the lines above it in its block that set variables."""

    page: str
    text: str
    before: str = ""

    def words(self):
        """Lists of words, one for each program; variables that `before` sets are filled in."""
        text = fill_in(self.text.replace("\\\n", " "), self.before)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        found = [[]]
        for word in lexer:
            if word in SEPARATORS:
                found.append([])
            else:
                found[-1].append(word)
        return found


def fill_in(text, assignments):
    for name, value in re.findall(r"([A-Z_]+)=\"([^\"]*)\"", assignments):
        text = re.sub(rf"\${name}\b", value, text)
    return text


def blocks(page, language):
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page):
    """The page without fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page):
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def commands(page):
    """Each command once: those of bash blocks, then those within sentences."""
    name = page.relative_to(ROOT).as_posix()
    found = [command for block in blocks(page, "bash") for command in of_block(name, block)]
    inline = rf"(?:{ASSIGNMENT} )*(?:{PROGRAMS}) \S"
    found += [Command(name, text) for text in inline_code(page) if re.match(inline, text)]
    return list(dict.fromkeys(found))


def of_block(page, block):
    """A job script is one command; else a command ends with a line that a shell could run."""
    if block.startswith("#!"):
        return [Command(page, block)]
    found, before, lines = [], "", []
    for line in block.splitlines():
        lines.append(line)
        if not is_complete("\n".join(lines)):
            continue
        text, lines = "\n".join(lines), []
        if re.fullmatch(rf"(?:(?:export )?{ASSIGNMENT}[; ]*)+", text):
            before += text + "\n"
        elif text.strip() and not text.startswith("#"):
            found.append(Command(page, text, before))
    assert not lines, f"{page}: {lines} is no whole command"
    return found


def is_complete(text):
    if text.endswith("\\"):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation goes on in the next line
        return False
    return True


def links(page):
    """[(where it leads, anchor)] of the relative links and pictures of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [tuple((target + "#").split("#")[:2]) for target in found if "://" not in target]


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
