"""The pack in its host: what loading it registers, and that it leaves the host alone."""

from __future__ import annotations

import subprocess
import sys
import time

import clearsr_rig as rig
import pytest

IDS = [
    "ClearSRLoader",
    "ClearSRLREncode",
    "ClearSRControlApply",
    "ClearSRLSAKSampler",
    "ClearSRLSAPatch",
    "ClearSRColorFix",
    "ClearSRScheduler",
    "ClearSRSampler",
    "ClearSREmptyPrompt",
]


@pytest.mark.parametrize("node_id", IDS)
def test_every_node_explains_itself(node_id: str) -> None:
    """Name, category, description, and a tooltip on each input and output."""
    kind = rig.nodes.NODE_CLASS_MAPPINGS[node_id]
    schema = kind.GET_SCHEMA()
    assert schema.category == "ClearSR"
    assert schema.display_name and len(schema.description) > 40
    assert [item.id for item in schema.inputs if not item.tooltip] == []
    assert [item.display_name for item in schema.outputs if not item.tooltip] == []
    assert kind.INPUT_TYPES()  # what the front end asks for
    assert (rig.ROOT / "web" / "docs" / f"{node_id}.md").is_file()


def test_pack_registers_these_nodes_and_no_others() -> None:
    # The host names modules after their paths, and a host may lie in a folder below the pack.
    ours = [
        name
        for name, kind in rig.nodes.NODE_CLASS_MAPPINGS.items()
        if f"{getattr(kind, '__module__', '')}.".startswith(f"{rig.PACK_NAME}.")
    ]
    assert ours == IDS


def test_loading_changes_no_attribute_of_the_host() -> None:
    """Nothing is patched, replaced or added in any ComfyUI module or class."""
    changed = [
        f"{name}.{key}"
        for name, before in rig.host_before.items()
        for key in before.keys() | rig.host_after[name].keys()
        if before.get(key) != rig.host_after[name].get(key)
    ]
    assert changed == []


def test_loading_imports_nothing_heavy() -> None:
    """diffusers, peft and transformers stay out; the nodes bring in no third-party module that was not there."""
    for name in ("diffusers", "peft", "accelerate"):
        assert name not in sys.modules


def test_importing_the_core_is_fast() -> None:
    """clearsr_core costs little beyond torch itself (the benchmark measures the whole pack)."""
    code = (
        "import torch, einops, safetensors.torch, time; t = time.perf_counter();"
        f"import sys; sys.path.insert(0, {str(rig.ROOT)!r});"
        "import clearsr_core.control, clearsr_core.checkpoint, clearsr_core.lsa; print(time.perf_counter() - t)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0, f"of {time.perf_counter() - started:.1f} s"


def test_models_folder_is_known_and_only_lists_safetensors() -> None:
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["clearsr"]
    assert str(rig.MODELS) in paths
    assert extensions == {".safetensors"}


def test_user_file_hides_shipped_file_of_the_same_name(tmp_path, monkeypatch) -> None:
    loader = rig.module("nodes.loader")
    monkeypatch.setattr(loader, "SHIPPED", tmp_path)
    (tmp_path / "shipped_only.safetensors").write_bytes(b"x")
    (tmp_path / "both.safetensors").write_bytes(b"x")
    (rig.MODELS / "both.safetensors").write_bytes(b"y")
    try:
        names = loader.list_files()
        assert names.count("both.safetensors") == 1 and "shipped_only.safetensors" in names
        assert loader.find_file("both.safetensors") == rig.MODELS / "both.safetensors"
        assert loader.find_file("shipped_only.safetensors") == tmp_path / "shipped_only.safetensors"
        assert loader.find_file("../shipped_only.safetensors") is None
    finally:
        (rig.MODELS / "both.safetensors").unlink()
