"""An interpreter in which torch, transformers and PEFT are imported, and nothing of ours: code runs in forks of it.

Run as a program: each line of its standard input is code, as JSON; it prints, as JSON, whether the code ended well and
what the code printed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401


def run(code: str) -> tuple[bool, str]:
    """Whether `code` ends well in a process of its own, and what it prints."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        try:
            exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as said:
        text = said.read()
    return os.waitpid(child, 0)[1] == 0, text


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
