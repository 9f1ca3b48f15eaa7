"""Engines: what starts the workers of a run, as processes of this machine or as tasks of Ray.

A worker is the same program everywhere: it reads the recipe of the run, loads the model, and joins the run on its storage.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from kspec_guidance.synthesis.errors import SynthesisError, disk_errors
from kspec_guidance.synthesis.provenance import place_of
from kspec_guidance.synthesis.run import Run
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.utils.atomic_io import replace_all

__all__ = ["ENGINES", "Pool", "Task", "start_workers"]

ENGINES = ("processes", "ray")
RECIPE, LOGS = "recipe", "logs"
Task = Callable[[Mapping[str, bytes], str, str, str | None, str | None], int]


class Pool(Protocol):
    """Workers that were started."""

    def alive(self) -> int:
        """How many have not ended."""

    def wait(self, seconds: float) -> None:
        """Wait for some time, or until all have ended."""

    def failure(self) -> str:
        """What a worker that failed said last; empty if none did."""


@contextmanager
def start_workers(
    engine: str, workers: int, run: Run, storage: Storage, task: Task, sign: str | Path | None = None
) -> Iterator[Pool]:
    """Start workers of a run, and end those that are left when the block ends.

    Args:
        engine: ``processes`` or ``ray``.
        workers: their number.
        run: that they join.
        storage: of the run, in its folder.
        task: what a worker of Ray runs: of the recipe's files, the storage, model, device and ``sign``.
        sign: as in ``synthesize``.

    Raises:
        SynthesisError: if the run cannot be described for other processes, or the engine is not installed.
    """
    pipe, recipe = run.generator.pipe, run.recipe
    if recipe.obstacles:
        raise SynthesisError(
            "workers are processes of their own, which read what to make from a file; it lacks "
            f"{'; '.join(recipe.obstacles)}. Give models, filters and embedders by name, or start each worker by its own "
            "command (--join)"
        )
    assert storage.folder is not None
    folder = storage.folder / RECIPE
    with disk_errors(folder):
        replace_all({folder / name: text.encode() for name, text in recipe.files(run.prompts).items()})
        recipe.write_guide(folder)
    model, device = place_of(pipe), str(getattr(pipe, "device", "cpu"))
    signed = None if sign is None else str(sign)
    if engine == "ray":
        with _ray(workers, task, folder, storage, model, device, signed) as pool:
            yield pool
        return
    with _processes(workers, folder, storage, model, device, signed) as pool:
        yield pool


class _Processes:
    def __init__(self, started: list[subprocess.Popen], logs: list[Path]):
        self.started, self.logs = started, logs

    def alive(self) -> int:
        return sum(process.poll() is None for process in self.started)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.05)

    def failure(self) -> str:
        for process, log in zip(self.started, self.logs, strict=True):
            if process.poll():
                lines = log.read_text(errors="replace").strip().splitlines()
                how = f"was ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
                said = next((line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "")
                return f"A worker {how}{said and f': {said}'} (see {log})"
        return ""


@contextmanager
def _processes(
    workers: int, folder: Path, storage: Storage, model: str, device: str, sign: str | None
) -> Iterator[_Processes]:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # filters, and this package, from the same places
    environment = {"OMP_NUM_THREADS": threads} | dict(os.environ) | {"PYTHONPATH": paths}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    logs = folder.parent / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen] = []
    files: list[IO[bytes]] = []
    paths_of_logs = [logs / f"worker-{k:03d}.log" for k in range(workers)]
    try:
        for k in range(workers):
            line = [sys.executable, "-m", "kspec_guidance", "generate", "--reproduce", str(folder / "reproduce.yaml"),
                    "--join", storage.place, "--model", model, "--device", _device(device, k), "--quiet"]  # fmt: skip
            line += ["--no-sign"] if sign is None else ["--sign", sign]
            files.append(paths_of_logs[k].open("wb"))
            started.append(subprocess.Popen(line, env=environment, stdout=files[-1], stderr=subprocess.STDOUT))
        yield _Processes(started, paths_of_logs)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        for file in files:
            file.close()


def _device(device: str, k: int) -> str:
    """The device of worker ``k``: GPUs in turn."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"cuda:{k % max(1, torch.cuda.device_count())}"


class _Ray:
    def __init__(self, ray: Any, refs: list[Any]):
        self.ray, self.refs = ray, refs

    def alive(self) -> int:
        return len(self.ray.wait(self.refs, num_returns=len(self.refs), timeout=0)[1])

    def wait(self, seconds: float) -> None:
        self.ray.wait(self.refs, num_returns=len(self.refs), timeout=seconds)

    def failure(self) -> str:
        for ref in self.refs:
            try:
                self.ray.get(ref)
            except Exception as error:
                return f"A worker failed: {' '.join(str(getattr(error, 'cause', error)).split())}"
        return ""


@contextmanager
def _ray(
    workers: int, task: Task, folder: Path, storage: Storage, model: str, device: str, sign: str | None
) -> Iterator[_Ray]:
    try:
        import ray
    except ImportError as error:
        raise SynthesisError("engine 'ray' needs: pip install 'kspec-guidance[ray]'") from error
    begun = not ray.is_initialized()
    if begun:
        alone = "RAY_ADDRESS" not in os.environ
        more: dict[str, Any] = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False} if alone else {}
        ray.init(log_to_driver=False, configure_logging=False, **more)
    try:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        gpus = 1 if device.startswith("cuda") else 0
        # a task that was lost with its machine is started again, by Ray, as often as that happens
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(task)
        place = str(Path(storage.place).absolute())
        refs = [remote.remote(files, place, model, "cuda:0" if gpus else device, sign) for _ in range(workers)]
        pool = _Ray(ray, refs)
        try:
            yield pool
        finally:
            for ref in refs:
                ray.cancel(ref, force=True)
    finally:
        if begun:
            ray.shutdown()
