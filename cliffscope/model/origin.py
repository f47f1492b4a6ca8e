"""Was this made with the model at hand?

A probe, a readout, an edit, a ranking and the scores of a pool mean nothing on other weights or behind another closing,
even where the sizes fit. Each carries its origin, and every function that brings one together with a model compares
them. Who means to use it on another model says so with `allow_other_model=True`, which the result then records.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from cliffscope.errors import OtherModelError
from cliffscope.model.load import LensModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that something was made with."""

    fingerprint: str
    """Of its weights; "" where it is not known, which is compared with nothing."""
    template: str = ""
    """Name of its template; "" where it is not known."""
    note: str = ""
    """That it is used on another model than the one it was made with; "" where it is not."""

    @classmethod
    def of(cls, model: LensModel) -> "Origin":
        """The origin of what is made with a model."""
        return cls(fingerprint=model.fingerprint, template=model.template.name)

    def check(self, what: str, model: LensModel) -> None:
        """Raises OtherModelError if the model has other weights or another template.

        Args:
            what: that which has this origin, as the subject of a sentence, such as "The probe readout".
            model: the model that it meets.
        """
        why = self._difference(model)
        if why:
            raise OtherModelError(
                f"{what} was made with another model than {model.name!r}: {why}. Make it with this model, or take "
                "its for_model(model, allow_other_model=True) (--allow-other-model), which is noted in the results."
            )

    def moved_to(self, what: str, model: LensModel) -> "Origin":
        """The origin of the same thing once it is used on another model, with a note where it is another one."""
        why = self._difference(model)
        if not why:
            return self
        note = f"{what} was made with another model than {model.name!r} ({why}) and used on it all the same."
        _log.warning(note)
        return Origin(
            fingerprint=model.fingerprint, template=model.template.name, note=" ".join((self.note, note)).strip()
        )

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {"fingerprint": self.fingerprint, "template": self.template, "note": self.note}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Origin":
        """Reads what `to_dict` wrote."""
        return cls(**{name: str(data.get(name, "")) for name in ("fingerprint", "template", "note")})

    def _difference(self, model: LensModel) -> str:
        """In which way the model is another one; "" where it is the same."""
        if self.fingerprint and self.fingerprint != model.fingerprint:
            return f"its weights have the fingerprint {self.fingerprint}, these {model.fingerprint}"
        if self.template and self.template != model.template.name:
            return f"it closed thinking as template {self.template!r} does, this one as {model.template.name!r}"
        return ""
