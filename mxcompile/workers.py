"""Threads that each do work of their own.

Operators of torch share one operator among all threads, which meet at its end. Threads that meet
only when a sample or a block is done lose less to small operators, and on a machine with other
work, where any of them may have to wait for its CPU, they are several times faster.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def pool() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch would use threads; operators of a worker stay in its thread.

    What has not begun when the context is left is not begun: after Ctrl-C nobody waits for it.
    """
    found = ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield found
    finally:
        found.shutdown(cancel_futures=True)
