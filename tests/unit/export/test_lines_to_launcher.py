"""Threads of an export that read a base's files at once tell the launcher how far they are: each line stays whole."""

import subprocess
import sys

THREADS, LINES = 8, 500

PRINTS = f"""
import sys, threading
from trainer.export.destination import print_bytes, print_sentence
sys.setswitchinterval(1e-6)

def tell(thread):
    for line in range({LINES}):
        print_bytes(thread, line)
        print_sentence(f"thread {{thread}}")

threads = [threading.Thread(target=tell, args=(thread,)) for thread in range({THREADS})]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_lines_of_threads_stay_whole() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, timeout=120, check=True)
    expected = [f"progress {thread} {line}" for thread in range(THREADS) for line in range(LINES)]
    expected += [f"say thread {thread}" for thread in range(THREADS) for _ in range(LINES)]
    assert sorted(done.stdout.splitlines()) == sorted(expected)
