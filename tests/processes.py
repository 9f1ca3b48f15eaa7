"""Processes of a test, forked from one that has imported torch and diffusers already: a start costs no imports."""

import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
# of the process that all are forked from; a pool of threads would not survive a fork
FORKS.set_forkserver_preload(["tests.one_thread", "torchmetrics", "tests.preload"])


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


class Popen(subprocess.Popen):
    """A process of ``python -m MODULE`` or ``python FILE.py`` is a fork that runs it; others start as usual.

    What a module reads from the environment when it is imported (``HF_ENDPOINT``) is as it was when the tests began.
    """

    _fork: Any = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else []
        words = [word for word in words if word != "-u"]
        if words[:1] != [sys.executable] or not (words[1] == "-m" or words[1].endswith(".py")):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        given = inspect.signature(super()._execute_child).bind(args, *rest).arguments  # type: ignore[misc]
        out = given["c2pwrite"] if given["c2pwrite"] != -1 else 1
        error = given["errwrite"] if given["errwrite"] != -1 else 2
        environment = dict(os.environ if given["env"] is None else given["env"])
        folder = os.fspath(given["cwd"] or os.getcwd())
        session = given["start_new_session"]
        self._fork = FORKS.Process(target=_main, args=(words[1:], environment, folder, _File(out), _File(error), session))
        self._fork.start()
        self.pid, self._child_created = self._fork.pid, True
        while session and self._fork.is_alive() and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # who ends a session by its number must not end that of the tests
        self._close_pipe_fds(*(given[k] for k in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))  # type: ignore[attr-defined]

    def _internal_poll(self, *args: Any, **kwargs: Any) -> Any:
        if self._fork is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc]
        if self.returncode is None:
            self.returncode = self._fork.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> Any:
        if self._fork is None:
            return super()._wait(timeout)  # type: ignore[misc]
        self._fork.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


class _File:
    """A file descriptor that a forked process gets, too."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> Any:
        return _File.received, (reduction.DupFd(self.number),)

    @staticmethod
    def received(number: Any) -> "_File":
        return _File(number.detach())


def _main(words: list[str], environment: dict[str, str], folder: str, out: _File, error: _File, session: bool) -> None:
    if session:
        os.setsid()
    for file, stream in ((out, 1), (error, 2)):
        os.dup2(file.number, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def launch(words: list[str]) -> None:
    """Run ``torchrun`` or ``accelerate launch`` in this process, and what it starts as forks, with one thread each.

    Raises:
        Exception: of the launcher, if a process of it failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    with pytest.MonkeyPatch.context() as patch, ExitStack() as handlers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # the launchers set their own
            handlers.callback(signal.signal, number, signal.getsignal(number))
        patch.setenv("OMP_NUM_THREADS", "1")
        for module in (subprocess, subprocess_handler):
            patch.setattr(module, "Popen", Popen)
        if words[0] == "torchrun":
            run.run(run.parse_args(words[1:]))
        else:
            launch_command(launch_command_parser().parse_args(words[2:]))
