"""Processes of a test, forked from one that has imported torch and diffusers already: a start costs no imports."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
# of the process that all are forked from; a pool of threads would not survive a fork
FORKS.set_forkserver_preload(["tests.one_thread", "torchmetrics", "tests.synthesis.one_process"])


class Launch:
    """Processes that find each other as those of ``torchrun`` do.

    Args:
        function: of a module, called in each process.
        processes: number of them.
        arguments: of the function.
        log: file for what they print.
    """

    def __init__(self, function: Any, processes: int, arguments: tuple, log: Path):
        self.log = log
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            FORKS.Process(target=_run, args=(function, arguments, rank, processes, self.store.port, log))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float = 300) -> None:
        """Wait until all have ended without an error."""
        for process in self.processes:
            process.join(seconds)
        failed = [process.exitcode for process in self.processes if process.exitcode != 0]
        if failed:
            self.kill()
        assert not failed, self.log.read_text()[-3000:]


def _run(function: Any, arguments: tuple, rank: int, processes: int, port: int, log: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    function(*arguments)
