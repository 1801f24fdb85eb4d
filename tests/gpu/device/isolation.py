"""Items of a part in processes that what breaks one of them, or hangs, does not take along."""

from __future__ import annotations

import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from device.results import AbsentError, append, folder

# a process begins as a copy of one that has imported what all need, and has not touched the GPU
CONTEXT = get_context("forkserver")


@dataclass(frozen=True)
class Part:
    """A part of the timetable."""

    name: str
    # has names(), the items in order, and work(name), which returns facts of one, or raises
    module: str
    # that the part may take, and one of its items
    seconds: float
    item_seconds: float = 60
    processes: int = 1


def run(part: Part) -> dict[str, str]:
    """Run a part's items; AssertionError fails an item, any other error also ends its process, as a crash does.

    After an error the GPU may answer nothing but errors to a process. The next item begins in a new one.

    Returns:
        What came of each item, and, where one could not begin, under "" of the part.
    """
    deadline = time.monotonic() + part.seconds
    statuses: dict[str, str] = {}
    with ThreadPoolExecutor(part.processes) as pool:
        list(pool.map(lambda index: _run_share(part, index, deadline, statuses), range(part.processes)))
    return statuses


def _run_share(part: Part, index: int, deadline: float, statuses: dict[str, str]) -> None:
    """Run every item whose number leaves `index` when divided by the number of processes."""
    num_done = 0
    log = folder() / "log.txt"
    while time.monotonic() < deadline:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_work, args=(part, index, num_done, log, sender), daemon=True)
        process.start()
        sender.close()
        item, began, status = "", time.monotonic(), "crashed"
        num_before = num_done
        try:
            while True:
                if not receiver.poll(max(0.0, min(deadline, began + part.item_seconds) - time.monotonic())):
                    status = "timed out"
                    break
                kind, name, facts = receiver.recv()
                if kind == "finished":
                    process.join()
                    return
                if kind == "item":
                    item, began = name, time.monotonic()
                    continue
                if name:
                    facts["seconds"] = round(time.monotonic() - began, 3)
                    item, num_done = "", num_done + 1
                append(part.name, name, kind, **facts)
                if name or kind != "begun":
                    statuses[name] = kind
                if not name and kind != "begun":
                    process.join()
                    return
        except EOFError:
            pass
        process.kill()
        process.join()
        seconds = round(time.monotonic() - began, 3)
        if item:
            append(part.name, item, status, why=f"exit code {process.exitcode}", seconds=seconds)
            statuses[item] = status
            num_done += 1
        elif num_done == num_before:
            append(part.name, "", "failed", why=f"{status} before any item, exit code {process.exitcode}")
            statuses[""] = "failed"
            return


def _work(part: Part, index: int, num_done: int, log: Path, sender: Connection) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        module = import_module(part.module)
        names = module.names()
    except Exception as error:
        sender.send(_message(error, ""))
        return
    if index == 0 and num_done == 0:
        sender.send(("begun", "", {"names": names}))
    for name in names[index :: part.processes][num_done:]:
        sender.send(("item", name, {}))
        print(f"{part.name}: {name}", flush=True)
        try:
            facts = module.work(name)
        except Exception as error:
            sender.send(_message(error, name))
            if not isinstance(error, (AssertionError, AbsentError)):
                return
        else:
            sender.send(("ok", name, facts))
    sender.send(("finished", "", {}))


def _message(error: Exception, name: str) -> tuple[str, str, dict[str, object]]:
    """Return what became of an item that raised."""
    if isinstance(error, AbsentError):
        return "absent", name, {"why": str(error)}
    traceback.print_exception(error)
    return "failed", name, {"why": f"{type(error).__name__}: {error}"[:2000]}
