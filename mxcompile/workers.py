"""Threads that each do work of their own.

Operators of torch share one operator among all threads, which meet at its end. Threads that meet
only when a sample or a block is done lose less to small operators, and on a machine with other
work, where any of them may have to wait for its CPU, they are several times faster.
"""

from concurrent.futures import ThreadPoolExecutor

import torch


def pool() -> ThreadPoolExecutor:
    """As many workers as torch would use threads; operators of a worker stay in its thread."""
    return ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    )
