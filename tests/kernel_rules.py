"""Looks for violations of the rules that CUDA sources follow so that they can be emulated; csrc/common.h states them.

It reads C++ by its brackets only. What it cannot see, the emulation finds when it runs the kernel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

# The one file that may hold what only nvcc understands.
PTX_FILE = "ptx.cuh"

BANNED = {
    r"<<<": "launches without launch_kernel()",
    r"\bcudaLaunch(Cooperative)?Kernel(ExC?)?\b": "launches without launch_kernel()",
    r"\bextern\s+((__align__|alignas)\s*\([^)]*\)\s*)?__shared__": "extern __shared__, not dynamic_shared<T>()",
    r"__shared__\s+(alignas|__align__)\b": "an alignment after __shared__, where g++ ignores it",
}
BANNED_OUTSIDE_PTX_FILE = {
    r"\basm\b|\b__asm__\b": "inline PTX",
    r"\bwmma\b|\bnvcuda\b|#\s*include\s*[<\"]mma\.h": "mma",
    r"\b__pipeline_\w+|\bmemcpy_async\b|#\s*include\s*[<\"]cuda_pipeline": "cp.async",
    r"#\s*include\s*[<\"]cooperative_groups": "cooperative groups",
}
MEETING = r"__syncthreads(_\w+)?|__syncwarp|__shfl(_\w+)?_sync|__(ballot|any|all)_sync|warp_values"


@dataclasses.dataclass
class Function:
    """A function with a body."""

    name: str
    header: str
    body: str
    line: int
    anonymous: bool  # whether it stands in an anonymous namespace


def violations(files: dict[str, str]) -> list[str]:
    """What breaks a rule in sources that are given by their name, as "name:line: what" each."""
    texts = {name: without_comments(text) for name, text in files.items()}
    functions = {name: list(functions_in(without_directives(text))) for name, text in texts.items()}
    meeting = re.compile(rf"\b({'|'.join(meeting_functions([f for found in functions.values() for f in found]))})\b")
    found = []
    for name, text in texts.items():
        is_ptx_file = name.rpartition("/")[2] == PTX_FILE
        found += [f"{name}:{line}: {what}" for line, what in banned_in(text, is_ptx_file)]
        for function in functions[name]:
            found += [f"{name}:{line}: {what}" for line, what in misplaced_in(function, meeting)]
    return list(dict.fromkeys(found))


def banned_in(text: str, is_ptx_file: bool) -> Iterator[tuple[int, str]]:
    for pattern, what in (BANNED | ({} if is_ptx_file else BANNED_OUTSIDE_PTX_FILE)).items():
        for match in re.finditer(pattern, text):
            yield line_of(text, match.start()), what
    if is_ptx_file:
        for line, content, conditions in lines_with_conditions(text):
            if re.search(r"\basm\b|\b__asm__\b", content) and "INPAINT_EMULATION" not in conditions:
                yield line, "inline PTX without a plain C++ body under INPAINT_EMULATION"


def misplaced_in(function: Function, meeting: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    if not function.anonymous and re.search(r"\b__global__\b", function.header):
        yield function.line, f"{function.name}: a kernel outside of an anonymous namespace"
    if not function.anonymous and re.search(r"\b__shared__\b", function.body):
        yield function.line, f"{function.name}: shared memory outside of an anonymous namespace"
    for position in early_returns(function.body, meeting):
        yield function.line + function.body.count("\n", 0, position), f"{function.name}: a return before a barrier"


def early_returns(body: str, meeting: re.Pattern[str]) -> Iterator[int]:
    """Where a body returns although a barrier follows, below or in the next round of a loop."""
    for begin, end in lambdas_in(body):
        inner = body[begin:end]
        yield from (begin + position for position in early_returns(inner, meeting))
        # For the function around it the lambda is a meeting, or nothing.
        met = meeting.search(inner)
        blank = re.sub(r"[^\n]", " ", inner)
        if met:
            blank = blank[: met.start()] + met[0] + blank[met.end() :]
        body = body[:begin] + blank + body[end:]
    meetings = [match.start() for match in meeting.finditer(body)]
    loops = list(loops_in(body))
    for match in re.finditer(r"\breturn\b", body):
        here = match.start()
        around = [(begin, end) for begin, end in loops if begin <= here < end]
        after = body.find(";", here)  # what it returns may be a vote
        if any(m > after or any(begin <= m < end for begin, end in around) for m in meetings):
            yield here


def meeting_functions(functions: list[Function]) -> list[str]:
    """Patterns of all names whose call is a barrier, shuffle or vote: CUDA's, and the functions that call them."""
    names = [MEETING]
    callers = {f.name for f in functions if not re.search(r"\b__global__\b", f.header)}
    while True:
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        more = {f.name for f in functions if f.name in callers and pattern.search(f.body)} - set(names)
        if not more:
            return names
        names += sorted(more)


# ---- Reading C++ -----------------------------------------------------------------------------------------------------


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def without_comments(text: str) -> str:
    """The text with comments and the insides of string literals blanked; lines stay where they are."""

    def blank(match: re.Match[str]) -> str:
        if match[0].startswith('"'):
            return match[0] if is_include(text, match.start()) else '"' + " " * (len(match[0]) - 2) + '"'
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|(?<!\w)'(?:\\.|[^'\\\n])+'", blank, text, flags=re.DOTALL)


def is_include(text: str, position: int) -> bool:
    line = text[text.rfind("\n", 0, position) + 1 : position]
    return re.match(r"\s*#\s*include\b", line) is not None


def without_directives(text: str) -> str:
    """The text with the preprocessor's lines blanked."""
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.MULTILINE)


def lines_with_conditions(text: str) -> Iterator[tuple[int, str, str]]:
    """(number, line, the #if lines around it)."""
    conditions: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*#\s*if", line):
            conditions.append(line)
        elif re.match(r"\s*#\s*endif", line):
            conditions.pop()
        yield number, line, " ".join(conditions)


def closing(text: str, opening: int) -> int:
    """Where the bracket that opens at a position closes; the end of the text if it does not."""
    opened = text[opening]
    closed = {"(": ")", "{": "}", "[": "]", "<": ">"}[opened]
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == opened) - (text[position] == closed)
        if depth == 0:
            return position
    return len(text)


def functions_in(text: str, offset: int = 0, anonymous: bool = False, full: str | None = None) -> Iterator[Function]:
    """The functions of a piece of `full`, which begins at `offset` and is the inside of namespaces and classes."""
    full = text if full is None else full
    begin = 0
    while (opening := text.find("{", begin)) >= 0:
        header = re.split(r"[;}]", text[begin:opening])[-1]
        end = closing(text, opening)
        inside = text[opening + 1 : end]
        if re.search(r"\bnamespace\b[\s\w:]*$", header):
            nameless = re.search(r"\bnamespace\s*$", header) is not None
            yield from functions_in(inside, offset + opening + 1, anonymous or nameless, full)
        elif re.search(r"\b(class|struct|union)\b[^()]*$", without_template(header)):
            yield from functions_in(inside, offset + opening + 1, anonymous, full)
        elif (name := function_name(header)) is not None:
            yield Function(name, header, inside, line_of(full, offset + opening), anonymous)
        begin = end + 1


def without_template(header: str) -> str:
    """A declaration without its leading template parameters."""
    header = header.strip()
    while match := re.match(r"template\s*<", header):
        header = header[closing(header, match.end() - 1) + 1 :].strip()
    return header


def function_name(header: str) -> str | None:
    header = without_template(header)
    header = re.sub(
        r"\b(__launch_bounds__|__attribute__|alignas|__align__|decltype)\s*\((?:[^()]|\([^()]*\))*\)", " ", header
    )
    match = re.search(r"([A-Za-z_]\w*)\s*\(", header)
    return match[1] if match and "=" not in header[: match.start()] else None


def lambdas_in(body: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of the insides of lambdas, outermost only."""
    position = 0
    while match := re.compile(r"(?<![\w\])])\s*\[[^\[\]]*\]\s*(?=[({])").search(body, position):
        opening = match.end()
        if body[opening] == "(":
            after = re.compile(r"\s*(?:mutable\b|noexcept\b|->[^{;]*|\s)*").match(body, closing(body, opening) + 1)
            opening = after.end() if after else len(body)
        if opening < len(body) and body[opening] == "{":
            end = closing(body, opening)
            yield opening + 1, end
            position = end
        else:
            position = match.end()


def loops_in(body: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of what the loops of a body repeat, their conditions included."""
    for match in re.finditer(r"\b(?:for|while)\s*\(|\bdo\s*\{", body):
        if match[0].startswith("do"):
            yield match.start(), closing(body, match.end() - 1)
            continue
        after = closing(body, match.end() - 1) + 1
        statement = re.compile(r"\s*").match(body, after)
        begin = statement.end() if statement else after
        yield match.start(), closing(body, begin) if body[begin : begin + 1] == "{" else statement_end(body, begin)


def statement_end(body: str, begin: int) -> int:
    """The end of a statement without braces around it: its semicolon, or the braces that it ends with."""
    semicolon, brace = body.find(";", begin), body.find("{", begin)
    # A loop or condition in it may hold semicolons in its brackets.
    match = re.compile(r"\s*(?:for|while|if)\s*(?:constexpr\s*)?\(").match(body, begin)
    if match:
        after = closing(body, match.end() - 1) + 1
        inner = re.compile(r"\s*").match(body, after)
        at = inner.end() if inner else after
        return closing(body, at) if body[at : at + 1] == "{" else statement_end(body, at)
    if 0 <= brace < semicolon:
        return closing(body, brace)
    return semicolon if semicolon >= 0 else len(body)
