"""The promise of a model's labels: the target that applies, and the requests that it holds for."""

from collections.abc import Mapping, Sequence

from models.manifest import Manifest, Prompt
from runtime.errors import LoadFailed
from runtime.openai.confidence import PromisedLabels


def promised_labels(manifest: Manifest | None, target: float | None) -> PromisedLabels | None:
    """The promise of a model for `target` (None: the model's own); None if it is not calibrated for that."""
    if manifest is None or manifest.calibration is None or not manifest.labels:
        return None
    promise = manifest.calibration.promise(target)
    if promise is None:
        return None
    temperature = manifest.calibration.temperature
    return PromisedLabels(manifest.labels, temperature, promise.target, promise.threshold)


def require_target(manifests: Mapping[str, Manifest | None], target: float | None) -> None:
    """Raise LoadFailed if a model (by name) has no threshold recorded for `target`, or none of them is calibrated."""
    if target is None:
        return
    calibrated = {name: one.calibration for name, one in manifests.items() if one is not None and one.calibration}
    if not calibrated:
        names = ", ".join(map(repr, manifests))
        raise LoadFailed(
            f"--target {target:g}: {names} has no calibration to keep a promise by; convert a model with labels, "
            f"with --examples FILE --target {target:g}"
        )
    for name, calibration in calibrated.items():
        if calibration is not None and calibration.promise(target) is None:
            recorded = ", ".join(f"{promise.target:g}" for promise in calibration.promises)
            raise LoadFailed(
                f"--target {target:g}: {name!r} has thresholds for {recorded} only; take one of these, or convert it "
                f"again with --target {target:g}"
            )


def is_as_trained(said: Sequence[tuple[str, str]], prompt: Prompt, *, wrapped: bool) -> bool:
    """True for one text of the user in the form that the model was trained on, and so calibrated for.

    `said`: (role, text). With `wrapped` the form must be complete; else the server puts it around the text.
    """
    roles = [role for role, _ in said]
    if roles.count("user") != 1 or set(roles) - {"system", "user"} or roles[-1] != "user":
        return False
    systems = [text for role, text in said if role == "system"]
    if systems and systems != [prompt.system]:
        return False
    written = [(message["role"], message["content"]) for message in prompt.messages(said)]
    return not wrapped or written == list(said)
