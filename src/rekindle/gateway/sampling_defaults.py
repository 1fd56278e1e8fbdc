"""What a request gets where it says nothing, as the model's `generation_config.json` advises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.protocol.sampling import SamplingParams

SETTINGS_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Defaults within the ranges of `SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sampling_defaults(settings: Mapping[str, object], directory: Path) -> SamplingDefaults:
    """The defaults that `settings`, read from `directory`, advise; null means that there is no advice.

    Raises:
        ConfigurationError: a value is no number or out of its range; the message names the file and the field.
    """
    advised = {
        field.name: settings[field.name] for field in fields(SamplingDefaults) if settings.get(field.name) is not None
    }
    try:
        defaults = SamplingDefaults(**{name: _number(name, value) for name, value in advised.items()})  # type: ignore[arg-type]
        SamplingParams(
            max_tokens=1,
            seed=0,
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
        )
    except InvalidRequest as error:
        raise ConfigurationError(f"{directory / SETTINGS_NAME}: {error}; mend it and import the model again") from error
    return defaults


def _number(name: str, value: object) -> int | float:
    """JSON has one kind of number: 50.0 is the integer 50. A `top_k` of -1 asks for no limit, as 0 does."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number, got {value!r:.80}", field=name)
    if name != "top_k":
        return float(value)
    if not float(value).is_integer():
        raise InvalidRequest(f"{name} must be a whole number, got {value}", field=name)
    return 0 if value == -1 else int(value)
