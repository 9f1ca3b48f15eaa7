"""Models of arms: other denoisers and LoRAs in the pipeline of a run, loaded once, one denoiser on its device at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from kspec_guidance.loop.components import denoiser_of, load_pipeline
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.settings import DIGITS
from kspec_guidance.utils.hashing import fingerprint, hash_tensors, same_network
from kspec_guidance.utils.placement import accelerate_hooks, diffusers_hooks
from kspec_guidance.utils.progress import quiet_loading

if TYPE_CHECKING:
    from kspec_guidance.synthesis.arms import Arm

__all__ = ["ArmModels"]


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn errors of the hub, the files, or a missing package into a :class:`SynthesisError` that names the source."""
    try:
        with quiet_loading():
            yield
    except Exception as error:
        raise SynthesisError(f"cannot load {name!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class ArmModels:
    """Denoisers, schedulers and LoRAs of arms.

    The model of an arm is its denoiser with its scheduler. All other networks must be those of the run's pipeline:
    otherwise samples, or prompts, of two arms could not be compared.

    Args:
        arms: of the run.
        pipe: of the run.

    Raises:
        SynthesisError: for models or LoRAs that cannot be loaded, models of another class or with other networks besides
            the denoiser, and pipelines with offloading, whose networks cannot be exchanged.
    """

    def __init__(self, arms: "Sequence[Arm]", pipe: Any):
        self.pipe, self.arms = pipe, list(arms)
        denoiser, components = denoiser_of(pipe), getattr(pipe, "components", {})
        self.attribute = next((name for name, part in components.items() if part is denoiser), "")
        models = [arm.model for arm in arms if arm.model is not None]
        loras = [arm.lora for arm in arms if arm.lora is not None]
        modules = [part for part in components.values() if isinstance(part, nn.Module)]
        if models and (not self.attribute or any(accelerate_hooks(m) or diffusers_hooks(m) for m in modules)):
            raise SynthesisError("arms with a model need a pipeline with one denoiser and without offloading")
        if loras and not hasattr(pipe, "load_lora_weights"):
            raise SynthesisError(f"{type(pipe).__name__} takes no LoRA")
        self.networks: dict[str | None, tuple[Any, Any]] = {None: (denoiser, getattr(pipe, "scheduler", None))}
        self.networks |= {model: self._load(model) for model in dict.fromkeys(models)}
        self.digests = {lora: self._digest(lora) for lora in dict.fromkeys(loras)}
        self.adapters: dict[tuple[str | None, str], str] = {}  # names of the LoRAs of each model
        self.model: str | None = None  # whose denoiser the pipeline has
        self.active: list[str] = []  # LoRAs that the pipeline had

    def _load(self, model: str) -> tuple[Any, Any]:
        with _loading(model):
            found = load_pipeline(model, self.pipe.dtype)
        if not isinstance(self.pipe, type(found)):
            raise SynthesisError(f"{model!r} is a {type(found).__name__}, and the run has a {type(self.pipe).__name__}")
        for name, part in self.pipe.components.items():
            other = found.components.get(name)
            if name == self.attribute or not isinstance(part, nn.Module) or not isinstance(other, nn.Module):
                continue
            if not same_network(fingerprint(part), fingerprint(other)):
                raise SynthesisError(
                    f"the {name} of {model!r} is another network than that of the run, so that their images, or prompts, "
                    "cannot be compared; arms may differ in the denoiser alone"
                )
        return getattr(found, self.attribute), found.scheduler

    def _digest(self, lora: str) -> str:
        with _loading(lora):
            state = self.pipe.lora_state_dict(lora)
        return hash_tensors(state[0] if isinstance(state, tuple) else state, digits=DIGITS)

    def describe(self, arm: "Arm") -> dict[str, Any]:
        """What the settings of a run say of the weights of an arm."""
        model = {} if arm.model is None else {"denoiser": fingerprint(self.networks[arm.model][0])}
        return model if arm.lora is None else {**model, "lora_digest": self.digests[arm.lora]}

    def scheduler(self, arm: "Arm") -> Any:
        """The scheduler of an arm's model."""
        return self.networks[arm.model][1]

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The LoRAs in the denoisers; at the end the pipeline is as before."""
        self.active = list(self.pipe.get_active_adapters()) if self.digests else []
        try:
            for arm in self.arms:
                if arm.lora is not None and (arm.model, arm.lora) not in self.adapters:
                    self._place(arm.model)
                    name = f"arm{len(self.adapters)}"
                    with _loading(arm.lora):
                        self.pipe.load_lora_weights(arm.lora, adapter_name=name)
                        if not any(name in names for names in self.pipe.get_list_adapters().values()):
                            raise ValueError("it has no weights for the networks of this pipeline")
                    self.adapters[arm.model, arm.lora] = name
            yield
        finally:
            for (model, _), name in self.adapters.items():
                self._place(model)
                if self.active:
                    self.pipe.delete_adapters(name)
                else:
                    self.pipe.unload_lora_weights()
            self._place(None)
            if self.active:
                self.pipe.enable_lora()
                self.pipe.set_adapters(self.active)
            self.adapters.clear()

    def use(self, arm: "Arm") -> None:
        """Give the pipeline the denoiser and the LoRA of an arm."""
        self._place(arm.model)
        if not self.adapters:
            return
        names = self.active if arm.model is None else []
        if arm.lora is not None:
            names = [*names, self.adapters[arm.model, arm.lora]]
        if names:
            self.pipe.enable_lora()
            self.pipe.set_adapters(names)
        else:
            self.pipe.disable_lora()

    def _place(self, model: str | None) -> None:
        if model == self.model:
            return
        before, now = self.networks[self.model][0], self.networks[model][0]
        device = before.device
        if device.type != "cpu":
            before.to("cpu")
            now.to(device)
        setattr(self.pipe, self.attribute, now)
        self.model = model
