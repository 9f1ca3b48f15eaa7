"""A worker of a server, in its own process: it steps several requests in turn, each with a scheduler of its own."""

import copy
import multiprocessing
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from kspec_guidance import SPARKE, MemoryBank

STEPS = 6
PROMPTS = {"heart": 0, "cats": 1}


def embeddings(prompt, n):
    return torch.eye(2)[PROMPTS[prompt]].expand(n, 5, 2)


def denoise(x, prompt):
    """A velocity field that pulls all samples of a prompt to two points."""
    centre = torch.full_like(x, 1.0 if prompt == "heart" else -1.0)
    return x - centre * torch.tanh(4 * x)


@dataclass
class Request:
    """The state of a request between its steps."""

    number: int
    prompt: str
    latents: torch.Tensor
    scheduler: Any
    guide: Any = None
    step: int = 0


class Worker:
    """Steps all requests in turn and accepts new ones in between, as servers with continuous batching do."""

    def __init__(self, variety):
        self.variety, self.memory = variety, MemoryBank()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def accept(self, number, prompt, seed, n):
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        guide = None if self.variety is None else SPARKE(variety=self.variety, memory=self.memory)
        return Request(number, prompt, latents, scheduler, guide)

    def step(self, request):
        velocity = denoise(request.latents, request.prompt)
        if request.guide is not None:
            given = {"prompt_embeds": embeddings(request.prompt, len(request.latents)), "latents": request.latents}
            request.guide.before_step(request.scheduler, request.step, STEPS, given)
        t = request.scheduler.timesteps[request.step]
        request.latents = request.scheduler.step(velocity, t, request.latents, return_dict=False)[0]
        request.step += 1

    def run(self, arrivals):
        """Samples by the number of their request. ``arrivals`` are (tick, prompt, seed, images) of each request."""
        waiting = [(tick, number, *rest) for number, (tick, *rest) in enumerate(arrivals)]
        active, done, now = [], {}, 0
        while waiting or active:
            active += [self.accept(*request[1:]) for request in waiting if request[0] <= now]
            waiting = [request for request in waiting if request[0] > now]
            for request in active:
                self.step(request)
            done |= {request.number: request.latents for request in active if request.step == STEPS}
            active = [request for request in active if request.step < STEPS]
            now += 1
        return done


def serve(connection):
    torch.set_num_threads(1)
    workers = {}
    for variety, arrivals, name in iter(connection.recv, None):
        worker = workers.setdefault((variety, name), Worker(variety))
        done = worker.run(arrivals)
        connection.send(([done[k].tolist() for k in sorted(done)], len(worker.memory)))


@pytest.fixture(scope="module")
def server():
    """Runs requests in a worker process that keeps its memory."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()

    def run(variety, *arrivals, worker=""):
        here.send((variety, arrivals, worker))
        assert here.poll(60), "the worker does not answer"
        samples, remembered = here.recv()
        return [torch.tensor(s) for s in samples], remembered

    yield run
    here.send(None)
    process.join(10)


def test_requests_in_turn_are_those_of_one_after_the_other(server):
    plain, _ = server(None, (0, "heart", 1, 3), (2, "cats", 2, 3))
    idle, remembered = server(0.0, (0, "heart", 1, 3), (2, "cats", 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(idle, plain, strict=True))
    assert remembered == 6
    together, _ = server(50.0, (0, "heart", 1, 3), (2, "cats", 2, 3), worker="in turn")
    apart, _ = server(50.0, (0, "heart", 1, 3), (9, "cats", 2, 3), worker="one after the other")
    for found, expected, unguided in zip(together, apart, plain, strict=True):
        assert (found - unguided).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_later_request_differs_from_those_in_the_memory_of_its_worker(server):
    alone, _ = server(None, (0, "heart", 7, 1))
    first, remembered = server(80.0, (0, "heart", 7, 1))
    assert torch.equal(first[0], alone[0])
    assert remembered == 1
    (second, other), remembered = server(80.0, (0, "heart", 7, 1), (1, "cats", 7, 1))
    assert remembered == 3
    assert (second - alone[0]).abs().max() > 1e-3
    unguided, _ = server(None, (0, "cats", 7, 1))
    torch.testing.assert_close(other, unguided[0], atol=1e-5, rtol=1e-5)  # of another prompt


def test_a_worker_makes_the_samples_of_an_attached_guide(server):
    found, _ = server(60.0, (0, "heart", 3, 4), (0, "heart", 4, 4))
    worker = Worker(None)
    request = worker.accept(0, "heart", 3, 4)
    with SPARKE(variety=60.0).attach(request.scheduler):
        for _ in range(STEPS):
            worker.step(request)
    torch.testing.assert_close(found[0], request.latents, atol=1e-6, rtol=1e-6)


def test_the_scheduler_in_a_wrapper_is_guided():
    class Wrapper:  # as in xDiT: passes steps on to the scheduler that it contains
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            return getattr(self.__dict__["module"], name)

        def step(self, *args, **kwargs):
            return self.module.step(*args, **kwargs)

    worker = Worker(60.0)
    expected, found = worker.accept(0, "heart", 3, 4), Worker(60.0).accept(0, "heart", 3, 4)
    found.scheduler = Wrapper(found.scheduler)
    with SPARKE(variety=60.0).attach(found.scheduler.module):
        found.guide = None
        for _ in range(STEPS):
            worker.step(expected)
            worker.step(found)
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-6, rtol=1e-6)
