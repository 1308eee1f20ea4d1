"""What is wrong with a kernel's PTX: the order of stores, barriers, flags and kernels, followed along every path."""

from __future__ import annotations

import re


class Code:
    """The instructions of a kernel and who may follow whom."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".entry") :]
        self.lines: list[str] = []
        labels: dict[str, list[int]] = {}
        for line in body.splitlines():
            text = line.split("//")[0].strip()
            label = re.fullmatch(r"([$\w]+):", text)
            if label:
                labels.setdefault(label[1], []).append(len(self.lines))
            elif text and not text.startswith((".", "{", "}", "(", ")")):
                self.lines.append(text)
        self.lines.append("ret;")
        self.after: list[list[int]] = []
        self.before: list[list[int]] = [[] for _ in self.lines]
        for index, text in enumerate(self.lines):
            following = [index + 1] if index + 1 < len(self.lines) else []
            branch = re.search(r"\bbra(?:\.uni)?\s+([$\w]+)", text)
            if branch:  # inline assembly repeats its labels in scopes of their own: the nearest is meant
                target = min(labels[branch[1]], key=lambda at: abs(at - index))
                following = [target] if not text.startswith("@") else [*following, target]
            elif re.match(r"(ret|trap|exit)\b", text):
                following = []
            self.after.append(following)
            for other in following:
                self.before[other].append(index)

    def find(self, pattern: str) -> list[int]:
        return [index for index, text in enumerate(self.lines) if re.search(pattern, text)]

    def reaches(self, start: int, neighbours: list[list[int]], wrong: str, right: str) -> str | None:
        """The first instruction matching `wrong` on a path from `start` that has not met one matching `right`."""
        seen, open_ = {start}, list(neighbours[start])
        while open_:
            index = open_.pop()
            if index in seen:
                continue
            seen.add(index)
            if re.search(wrong, self.lines[index]):
                return self.lines[index]
            if not re.search(right, self.lines[index]):
                open_ += neighbours[index]
        return None


BARRIER = r"\bbar\.sync|\bbarrier\.sync"
DATA_STORE = r"\bst\.global"  # st.relaxed.sys.global is the error record
DATA_LOAD = r"\bld\.global(?!\S*acquire)|\bcp\.async\.c[ag]"
TMA_STORE, TMA_ARRIVED = r"\bcp\.async\.bulk\.tensor\S*\.global\.shared", r"\bcp\.async\.bulk\.wait_group\s"
COUNT = r"\batom\S*\.gpu\S*\.add"
FLAG_WRITE = r"\batom\S*\.exch\."
FLAG_READ = r"\b(?:ld|atom)\S*\.sys\S*\.acquire|\b(?:ld|atom)\S*\.acquire\S*\.sys"
KERNEL_WAIT, KERNEL_LAUNCH = r"\bgriddepcontrol\.wait", r"\bgriddepcontrol\.launch_dependents"
ACCESS = r"\b(?:ld|st|red)\.\S*global|\b(?:ld|st)\.volatile|\batom\b|\bcp\.(?:async|reduce)|\btensormap\.cp_fenceproxy"
HEAD_READ = r"\b(?:ld|atom)\S*\.sys\.relaxed\.(?:b64|add)"


def lint_norm(ptx: str) -> list[str]:
    """What the norm's kernel relies on: elements that arrive are seen, behind their head, and sentinels follow the loads."""
    code = Code(ptx)
    problems = []
    loads = code.find(r"ld\.volatile\.global")
    if not loads:
        problems.append("elements are not loaded anew while they are awaited")
    if not code.find(r"^trap;"):
        problems.append("the waits are not bounded")
    for load in loads:
        if code.reaches(load, code.before, r"ld\.param", HEAD_READ):
            problems.append(f"no head is awaited before {code.lines[load]}")
        if code.reaches(load, code.before, HEAD_READ, BARRIER):
            problems.append(f"no barrier between a head and {code.lines[load]}")
        if code.reaches(load, code.after, r"^ret;", r"st\.global\.v\d"):
            problems.append(f"no sentinel is put back behind {code.lines[load]}")
    return problems


def lint(ptx: str) -> list[str]:
    """What breaks the rules of docs/memory-ordering.md; empty for correct code."""
    code = Code(ptx)
    problems = []
    flag_writes, flag_reads = code.find(FLAG_WRITE), code.find(FLAG_READ)
    if not flag_writes:
        problems.append("no flag is ever written")
    if not flag_reads:
        problems.append("no flag is ever acquired at scope sys")
    for index in flag_writes:
        text = code.lines[index]
        if "release" not in text or ".sys" not in text:
            problems.append(f"a flag is written without release at scope sys: {text}")
        store = code.reaches(index, code.before, DATA_STORE, BARRIER)
        if store:
            problems.append(f"no barrier between the store {store} and the flag {text}")
    for index in flag_reads:
        load = code.reaches(index, code.after, DATA_LOAD, BARRIER)
        if load:
            problems.append(f"no barrier between the acquire {code.lines[index]} and the load {load}")
    if code.find(r"\b(ld|atom)\S*\.sys\S*\.relaxed|\b(ld|atom)\S*\.relaxed\S*\.sys|ld\.volatile"):
        problems.append("a relaxed or volatile access, which orders nothing")
    for index in code.find(COUNT):
        load = code.reaches(index, code.before, DATA_LOAD, BARRIER)
        if load:  # of the word that is added to: all threads must have read it
            problems.append(f"no barrier between the load {load} and the count of this program")
    for index in code.find(TMA_STORE):
        if code.reaches(index, code.after, FLAG_WRITE, TMA_ARRIVED):
            problems.append("a TMA store is only waited for as far as its source may be reused")
    for index in code.find(TMA_ARRIVED):
        if code.reaches(index, code.after, FLAG_WRITE, BARRIER):
            problems.append("no barrier between the arrival of a TMA store and the flag")
    if code.find(r"setmaxnreg"):
        problems.append("the loop was warp-specialised, which loses barriers")
    if not code.find(r"%globaltimer") or not code.find(r"^trap"):
        problems.append("the waits are not bounded")
    return problems


def lint_order_of_kernels(ptx: str) -> list[str]:
    """A kernel that is launched early waits before it touches memory, and lets the next be launched only then."""
    code = Code(ptx)
    problems = []
    early = code.reaches(0, code.after, ACCESS, KERNEL_WAIT)
    if early:
        problems.append(f"memory is touched before the kernel before has ended: {early}")
    if not code.find(KERNEL_LAUNCH):
        problems.append("the next kernel is never launched early")
    if code.reaches(0, code.after, KERNEL_LAUNCH, KERNEL_WAIT):
        problems.append("the next kernel may begin before the one before this has ended")
    return problems


def without(pattern: str, ptx: str) -> str:
    return "\n".join(line for line in ptx.splitlines() if not re.search(pattern, line))
