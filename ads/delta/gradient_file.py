"""The file that the proxy's gradient is kept in, with what it was made from."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ads.dual.factors import Factors
from ads.stage import files
from ads.stage.errors import MissingInputError, UserError
from ads.stage.sidecar import at_a_commit, is_unrecorded

METADATA = "gradient"  # key in the file


def save(path: Path, compressed: dict, metadata: dict):
    """Write gradients (see `compress`) and `metadata` (a mapping) to a safetensors file.

    Factors of NAME are stored as NAME.left and NAME.right. The metadata are one entry: several would come in
    another order each time, and a gradient made again would seem another.
    """
    tensors = {}
    for name, g in compressed.items():
        parts = {".left": g.left, ".right": g.right} if isinstance(g, Factors) else {"": g}
        tensors |= {name + part: tensor.cpu().contiguous() for part, tensor in parts.items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(metadata)})


def metadata_of(file) -> dict:
    """What `save` was given with the gradients of an open file; empty where it did not write the file."""
    return json.loads((file.metadata() or {}).get(METADATA, "{}"))


def read(file, name: str):
    """The gradient of one parameter from an open gradient file: a float32 tensor or Factors."""
    if name in file.keys():  # noqa: SIM118 (no mapping)
        return file.get_tensor(name)
    return Factors(file.get_tensor(f"{name}.left"), file.get_tensor(f"{name}.right"))


def open_checked(path: Path, proxy_fingerprint: str):
    """Open a gradient file (safe_open; see `read`).

    Raises FileNotFoundError when it is missing, ValueError when it is cut short, was not written by
    save_grad.py, or is the gradient of a model with other contents.
    """
    remedy = "make it with save_grad.py"
    if not path.is_file():
        raise MissingInputError(f"gradient {path} does not exist: {remedy}")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"gradient {path} is damaged ({error}): delete it and {remedy}") from error
    metadata = metadata_of(file)
    if "proxy_fingerprint" not in metadata:
        raise UserError(f"{path} holds no proxy gradient: {remedy}")
    made_for = metadata["proxy_fingerprint"]
    if is_unrecorded(made_for, proxy_fingerprint):
        print(f"WARNING: gradient {path}: at which commit of {made_for} was not recorded", flush=True)
    elif made_for != proxy_fingerprint:
        differences = f"contents {made_for!r}, now {proxy_fingerprint!r}"
        raise UserError(
            f"gradient {path} belongs to another proxy ({metadata['proxy_student']}, {differences}): "
            f"set proxy_student to it, or {remedy}" + at_a_commit([differences])
        )
    return file


def check_matches(file, path: Path, model):
    """ValueError unless the gradient file has exactly the model's parameters, in their shapes."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    stored = stored_shapes(file)
    wrong = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"gradient {path} does not fit the proxy: {name} is {stored.get(name)} in the file, "
            f"{shapes.get(name)} in the model ({len(wrong)} parameters differ)"
        )


def stored_shapes(file) -> dict[str, list[int]]:
    """{parameter name: shape} of a gradient file."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for left in [name for name in shapes if name.endswith(".left")]:
        name = left.removesuffix(".left")
        right = shapes.pop(f"{name}.right", [0, 0])
        shapes[name] = [shapes.pop(left)[0], right[1]]
    return shapes
