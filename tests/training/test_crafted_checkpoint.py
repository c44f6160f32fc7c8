"""A checkpoint from a stranger, its manifest right: nothing in it runs, nothing outside it is read, and one line says why."""

import io
import json
import pickle
import re
import struct

import pytest
import torch
from test_checkpoint import trained
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from fastllava.disk import described
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.train.state import checkpoint
from fastllava.train.state.dcp_metadata import read_metadata


class Call:
    """Calls `function` when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(config, tmp_path):
    return checkpoint.save(tmp_path, 3, config, "digest", *trained(config))


def sign(folder):
    """Make the manifest fit what lies there."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({name: described(folder / name) for name in names}))
    return folder


def honest(folder):
    return pickle.loads((folder / "tensors" / ".metadata").read_bytes())  # noqa: S301 (our own)


def described_as(folder, content):
    (folder / "tensors" / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return sign(folder)


def refused(folder, words, config):
    """Export and resume refuse `folder` in one line that has `words`."""
    said = []
    for read in (
        lambda: export(folder, "llava", folder.parent / "out", lambda _: None),
        lambda: checkpoint.restore(checkpoint.verify(folder), *trained(config)),
    ):
        with pytest.raises(UserError, match=words) as error:
            read()
        said.append(str(error.value))
    assert all(len(text.splitlines()) == 1 and len(text) < 800 for text in said), said


def test_the_description_is_read_as_pytorch_reads_it(folder):
    ours, theirs = read_metadata(folder / "tensors"), honest(folder)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def in_the_plan(metadata, attack):
    metadata.planner_data["x"] = attack


def in_a_key(metadata, attack):
    metadata.storage_data[MetadataIndex("x", [0], 0)] = attack


def in_a_size(metadata, attack):
    next(iter(metadata.state_dict_metadata.values())).size = attack


@pytest.mark.parametrize("place", [None, in_the_plan, in_a_key, in_a_size])
@pytest.mark.parametrize("how", ["open", "eval", "system", "torch.load", "storage"])
def test_code_in_the_description_of_tensors_never_runs(how, place, folder, tmp_path, config):
    import os

    marker = tmp_path / "marker"
    text = f"open({str(marker)!r}, 'w')"
    inner = io.BytesIO()
    torch.save(Call(eval, text), inner)
    attack = {
        "open": Call(open, str(marker), "w"),
        "eval": Call(eval, text),
        "system": Call(os.system, f"touch {marker}"),
        "torch.load": Call(torch.load, io.BytesIO(inner.getvalue())),
        "storage": Call(torch.storage._load_from_bytes, inner.getvalue()),
    }[how]
    metadata = honest(folder)
    if place is None:
        metadata = attack
    else:
        place(metadata, attack)
    refused(described_as(folder, metadata), r"\.metadata: holds more or other than a description of tensors", config)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "hub.load"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties.create_from_tensor"),
        ("torch.serialization", "load"),
        ("builtins", "getattr"),
        ("functools", "partial"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_nothing_but_the_classes_of_a_description_can_be_named(module, name, folder, config):
    def word(text):
        return b"\x8c" + struct.pack("B", len(text)) + text.encode()

    refused(described_as(folder, b"\x80\x04" + word(module) + word(name) + b"\x93."), re.escape(f"it names {module}.{name}"), config)


def test_a_class_that_is_changed_on_the_way_stays_as_it_is(folder, config):
    before = dict(vars(TensorStorageMetadata))
    module, name = b"torch.distributed.checkpoint.metadata", b"TensorStorageMetadata"
    # BUILD upon the class itself, with a state of slots: setattr(class, "size", 1).
    state = b"(N}" + b"\x8c\x04size" + b"K\x01s" + b"t"
    described_as(folder, b"\x80\x04c" + module + b"\n" + name + b"\n" + state + b"b.")
    refused(folder, "holds more or other", config)
    assert dict(vars(TensorStorageMetadata)) == before


def elsewhere(metadata):
    for key in metadata.storage_data:
        metadata.storage_data[key] = _StorageInfo("../../secret.distcp", 0, 10)


def transformed(metadata):
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["zstd"]


def endless(metadata):
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([2**40])


@pytest.mark.parametrize(
    ("change", "words"), [(elsewhere, "places a tensor in"), (transformed, "transformed"), (endless, "larger than all files")]
)
def test_a_description_that_leads_elsewhere_is_refused(change, words, folder, config):
    metadata = honest(folder)
    change(metadata)
    refused(described_as(folder, metadata), words, config)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_in_a_shard_never_runs(form, folder, tmp_path, config):
    marker = tmp_path / "marker"
    attack = Call(open, str(marker), "w")
    buffer = io.BytesIO()
    torch.save(attack, buffer) if form == "zip" else buffer.write(pickle.dumps(attack, 2))
    (folder / "tensors" / "__0_0.distcp").write_bytes(buffer.getvalue())
    metadata = honest(folder)
    for key in metadata.storage_data:
        metadata.storage_data[key] = _StorageInfo("__0_0.distcp", 0, len(buffer.getvalue()))
    refused(described_as(folder, metadata), "more than plain tensors" if form == "zip" else "tensors: ", config)
    assert not marker.exists()


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, config):
    shard = folder / "tensors" / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    refused(sign(folder), r"tensors/__0_0\.distcp is a symbolic link", config)


@pytest.mark.parametrize("name", ["state.json", "run_config.json", "manifest.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "[" * 100_000, '{"step": "3", "prepared_digest": 1}', "\x00"])
def test_json_that_no_run_wrote_is_one_line(name, content, folder, config):
    (folder / name).write_text(content)
    refused(folder if name == "manifest.json" else sign(folder), "checkpoint-3: ", config)
