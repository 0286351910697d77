# SPDX-License-Identifier: Apache-2.0
"""Names -> model files: what ships with the package, what was fetched, checksums; and our own weights files.

Nothing here imports torch until weights are read or written: `resolve` and `catalogue` run on robots.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeprob_perception.engines import model_file
from deeprob_perception.errors import ModelError
from deeprob_perception.files import write_whole
from deeprob_perception.share import PACKAGE, share_dir

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"

# Our names for published checkpoints -> their repositories on the Hugging Face hub. Any other ORG/REPO works too.
OFFICIAL = {
    "swin-tiny": "microsoft/swin-tiny-patch4-window7-224",
    "swin-small": "microsoft/swin-small-patch4-window7-224",
    "swin-base": "microsoft/swin-base-patch4-window7-224",
    "swin-large": "microsoft/swin-large-patch4-window7-224-in22k",
    "swin-tiny-upernet": "openmmlab/upernet-swin-tiny",
    "swin-small-upernet": "openmmlab/upernet-swin-small",
    "swin-base-upernet": "openmmlab/upernet-swin-base",
    "swin-large-upernet": "openmmlab/upernet-swin-large",
    **{f"mit-b{i}": f"nvidia/mit-b{i}" for i in range(6)},
    **{f"segformer-b{i}": f"nvidia/segformer-b{i}-finetuned-ade-512-512" for i in range(5)},
    "segformer-b5": "nvidia/segformer-b5-finetuned-ade-640-640",
    "dino-vits16": "facebook/dino-vits16",
    "dino-vits8": "facebook/dino-vits8",
    "dino-vitb16": "facebook/dino-vitb16",
    "dino-vitb8": "facebook/dino-vitb8",
    "dinov2-vits14": "facebook/dinov2-small",
    "dinov2-vitb14": "facebook/dinov2-base",
    "dinov2-vitl14": "facebook/dinov2-large",
    "dinov2-vitg14": "facebook/dinov2-giant",
    "dinov2-vits14-registers": "facebook/dinov2-with-registers-small",
    "dinov2-vitb14-registers": "facebook/dinov2-with-registers-base",
    "dinov2-vitl14-registers": "facebook/dinov2-with-registers-large",
    "dinov2-vitg14-registers": "facebook/dinov2-with-registers-giant",
    "dinov3-vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-vitl16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}


@dataclass(frozen=True)
class Entry:
    """A model that has a name: one line of a folder's manifest.json."""

    name: str
    path: Path
    sha256: str
    task: str
    card: Path | None
    shipped: bool

    def intact(self) -> bool:
        """Tell whether the file is there and its bytes are the ones the manifest names."""
        return self.path.is_file() and checksum(self.path) == self.sha256


def shipped_dir() -> Path:
    return share_dir() / "models"


def cache_dir() -> Path:
    """Return the user's folder for fetched models (on Linux below XDG_CACHE_HOME, or else ~/.cache)."""
    from platformdirs import user_cache_path

    return user_cache_path(PACKAGE) / "models"


def catalogue() -> dict[str, Entry]:
    """Return every model that has a name here; a shipped one hides a fetched one of the same name."""
    return {**read_manifest(cache_dir(), shipped=False), **read_manifest(shipped_dir(), shipped=True)}


def fetched_weights() -> dict[str, Path]:
    """Return the weights in the cache by name: what `load_checkpoint` finds without a path."""
    return {path.stem: path for path in sorted(cache_dir().glob("*.safetensors"))}


def resolve(name_or_path: str | Path) -> Path:
    """Return the `.onnx` file of a model's name, or the path itself; a named one's sha256 is checked.

    A word without a slash and without `.onnx` is a name; anything else is a path.

    :raises ModelError: for an unknown name (listing those that there are), a missing file, or another checksum than the
        manifest's.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights only; `deeprob models convert {path} --export X.onnx` makes a model of it")
    if path.suffix == ".onnx" or "/" in text or os.sep in text:
        if not path.is_file():
            raise ModelError(f"there is no model file {path}; the named models are: {named()}")
        return path
    entry = catalogue().get(text)
    if entry is None:
        hint = f"; `deeprob models fetch {text}` gets this one" if text in OFFICIAL else ""
        if text in fetched_weights():
            hint = f"; {fetched_weights()[text]} holds its weights only"
        raise ModelError(f"there is no model named {text!r}; there are: {named()}{hint}; or give an .onnx file's path")
    if not entry.path.is_file():
        raise ModelError(f"the model {text!r} should be {entry.path}, which is missing; install or fetch it again")
    found = checksum(entry.path)
    if found != entry.sha256:
        raise ModelError(
            f"{entry.path} is damaged or was changed: its sha256 begins with {found[:12]}, the manifest's with "
            f"{entry.sha256[:12]}; install or fetch it again"
        )
    return entry.path


def named() -> str:
    return ", ".join(sorted(catalogue())) or "none"


def checksum(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path, shipped: bool) -> dict[str, Entry]:
    """Return the entries of a folder's manifest.json; none where there is no such file."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {
            name: Entry(
                name=name,
                path=folder / Path(row["file"]).name,
                sha256=row["sha256"],
                task=row["task"],
                card=folder / Path(row["card"]).name if row.get("card") else None,
                shipped=shipped,
            )
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a manifest ({error!r}); `deeprob models manifest {folder}` writes one") from error


def write_manifest(folder: Path) -> Path:
    """Write a folder's manifest.json from the `.onnx` files in it; NAME.md beside NAME.onnx is its card."""
    rows = {}
    for path in sorted(folder.glob("*.onnx")):
        card = path.with_suffix(".md")
        rows[path.stem] = {
            "file": path.name,
            "sha256": checksum(path),
            "card": card.name if card.is_file() else None,
            "task": model_file.read(path).metadata["task"],
        }
    keep(folder / MANIFEST, (json.dumps(rows, indent=2) + "\n").encode())
    return folder / MANIFEST


def fetch(source: str, name: str | None = None, size: tuple[int, int] | None = (480, 640)) -> tuple[Path, Path | None]:
    """Get a published checkpoint, convert it, and put it into the cache under a name.

    :param source: a name in `OFFICIAL`, ORG/REPO on the Hugging Face hub, or a folder with the same files.
    :param name: to keep it under; by default the official name, or else the last part of `source`.
    :param size: height and width to export an `.onnx` for; None for the weights only. A backbone has nothing to export.
    :return: the weights file, and the model file or None.
    :raises ModelError: when the hub cannot be reached, or the checkpoint is not one of ours to read.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = download(OFFICIAL.get(source, source))
    from deeprob_perception import checkpoints  # after what can fail without torch's seconds of import

    name = name or (source if source in OFFICIAL else Path(source).resolve().name)
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ModelError(f"{name!r} cannot be a model's name; give one of letters, digits, dots and dashes by --name")
    recipe, state = checkpoints.convert(folder)
    recipe["source"] = OFFICIAL.get(source, source if not Path(source).is_dir() else folder.name)
    recipe["licence"] = card_licence(folder / "README.md")
    weights = cache_dir() / f"{name}.safetensors"
    save_checkpoint(weights, state, recipe)
    if recipe["task"] == "backbone" or size is None:
        return weights, None
    if recipe["task"] == "features":  # whole patches
        patch = state["backbone.patch_embed.proj.weight"].shape[-1]
        size = (max(1, round(size[0] / patch)) * patch, max(1, round(size[1] / patch)) * patch)
    model = export(recipe, state, cache_dir() / f"{name}.onnx", *size)
    write_manifest(cache_dir())
    return weights, model


def download(repository: str) -> Path:
    """Return the local folder with a hub repository's weights and configuration, downloading what is not there."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        known = ", ".join(OFFICIAL)
        raise ModelError(f"{repository!r} is neither a folder nor ORG/REPO nor a name that can be fetched: {known}")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise ModelError("fetching needs huggingface-hub: pip install it, or give a local folder") from None
    wanted = ["config.json", "preprocessor_config.json", "README.md"]
    try:
        # Either weights file would do; some repositories hold both, of hundreds of MB each.
        files = HfApi().list_repo_files(repository)
        weights = "model.safetensors" if "model.safetensors" in files else "pytorch_model.bin"
        return Path(snapshot_download(repository, allow_patterns=[*wanted, weights]))
    except Exception as error:  # huggingface_hub, its HTTP library and the socket have an error class each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot fetch {repository} from the Hugging Face hub ({reason}); "
            "download it where there is a network and give the folder"
        ) from error


def card_licence(card: Path) -> str:
    """Return the licence that a hub repository's README names in its front matter, else `unknown`."""
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        line = front and re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE)
        if line:
            return line[1]
    return "unknown"


def export(
    recipe: dict[str, Any], state: "dict[str, Tensor]", path: Path, height: int, width: int, about: dict[str, str] | None = None
) -> Path:
    """Build the network of a recipe, load its weights and write it as an `.onnx`.

    :param about: metadata such as `name` and `licence`; default: the file's stem, and the recipe's licence.
    :raises ModelError: for a recipe that has nothing to export, or a size that does not fit it.
    """
    from deeprob_perception.checkpoints import build
    from deeprob_perception.export import export_features, export_segmentation

    said = {"name": path.stem, "licence": recipe.get("licence", "unknown"), **(about or {})}
    if recipe.get("task") in model_file.POLICY_OUTPUTS:
        from deeprob_perception.export_policy import export_policy

        policy = build(recipe)
        policy.load_state_dict(state)
        return export_policy(policy, recipe, path, said)
    writers = {"segmentation": export_segmentation, "features": export_features}
    task = recipe.get("task")
    if task not in writers:
        raise ModelError(f"{path.stem} is a {task} without masks to export; train a head on it first")
    net = build(recipe)
    net.load_state_dict(state)
    return writers[task](net.eval(), recipe, path, height, width, said)


def untrained(path: Path, folder: Path) -> Path | None:
    """Write a model file's network with random weights (seed 0) into a folder; None where torch is not installed."""
    try:
        import torch

        from deeprob_perception.checkpoints import build
    except ImportError:
        return None
    model = model_file.read(path)
    recipe, _ = load_checkpoint(path)
    torch.manual_seed(0)
    _, height, width, _ = model.inputs[0].shape
    return export(recipe, build(recipe).state_dict(), folder / f"{path.stem}-untrained.onnx", height, width)


def save_checkpoint(path: str | Path, state: "dict[str, Tensor]", recipe: dict[str, Any]) -> Path:
    """Write weights as safetensors with the recipe (JSON) in the header; whole or not at all.

    :param state: a `state_dict` under our names. Tensors that share memory are copied.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    keep(path, save(tensors, metadata={"recipe": json.dumps(recipe)}))
    return path


def weights_file(name_or_path: str | Path) -> Path:
    """Return the file to fine-tune from: a path, or a name's fetched weights, or else its model file."""
    path = Path(name_or_path)
    fetched = cache_dir() / f"{path}.safetensors"
    if path.suffix in (".onnx", ".safetensors") or len(path.parts) > 1 or path.is_file():
        return path
    return fetched if fetched.is_file() else resolve(path)


def load_checkpoint(name_or_path: str | Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Read `(recipe, state)` from a file of `save_checkpoint` or `deeprob export`; check it against the recipe's network.

    An `.onnx` holds matrices and kernels in float16; the state is float32 with those rounded values.

    :raises ModelError: when the file is missing, damaged, not ours, or its tensors are not the recipe's.
    """
    import torch

    from deeprob_perception.checkpoints import check_state

    path = weights_file(name_or_path)
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    if path.suffix == ".onnx":
        recipe, state = read_onnx(path)
    elif path.suffix == ".safetensors":
        recipe, state = read_safetensors(path)
    else:
        raise ModelError(f"{path}: not a .safetensors or .onnx of ours; `deeprob models convert` makes one of others")
    for name in [name for name in state if name.endswith(".running_mean")]:
        # Exported graphs don't hold the counter that only training reads.
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    check_state(recipe, state, str(path))
    return recipe, state


def read_safetensors(path: Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            recipe = parse_recipe((file.metadata() or {}).get("recipe"), path)
            return recipe, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error


def read_onnx(path: Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    import torch
    from onnx.numpy_helper import to_array

    model = model_file.read(path)
    if model.precision != "fp32":
        raise ModelError(f"{path} is a model file in {model.precision}, whose weights cannot be read back; take the fp32 one")
    recipe = parse_recipe(model.metadata.get("recipe"), path)
    state = {}
    for tensor in model_file.parse(path).graph.initializer:
        # The graph's own constants stand beside the weights, whose names are torch's and begin with the module's.
        if tensor.name.startswith(("backbone.", "head.")):
            weight = torch.from_numpy(to_array(tensor).copy())
            state[tensor.name] = weight.float() if weight.is_floating_point() else weight
    return recipe, state


def parse_recipe(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        raise ModelError(f"{path} holds no recipe, so it is not ours; `deeprob models convert` makes one of ours from it")
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: its recipe is not JSON ({error})") from error
    if not isinstance(recipe, dict) or "backbone" not in recipe:
        raise ModelError(f"{path}: its recipe names no backbone")
    return recipe


def keep(path: Path, content: bytes) -> None:
    """Write a file of the zoo, whole or not at all."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
