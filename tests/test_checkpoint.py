"""Reading checkpoints: only what is wanted, and one clear line for everything that is wrong."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spatialprobe.engine.checkpoint import Checkpoint, content_hash, empty_module, load_weights
from spatialprobe.engine.presets import detect_family


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm1 = nn.Linear(3, 4), nn.LayerNorm(4)
        self.register_buffer("table", torch.arange(5.0), persistent=False)
        self.register_buffer("kept", torch.zeros(2))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = Net()
    net.kept += 7
    weights = net.state_dict() | {"unwanted": torch.zeros(1000)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path, weights


def test_loads_values_dtypes_and_computed_buffers(saved):
    root, weights = saved
    checkpoint, net = Checkpoint.open(str(root)), empty_module(Net)
    assert net.a.weight.is_meta
    load_weights(net, checkpoint, dtype=torch.bfloat16, keep_fp32=("norm1",))
    assert torch.equal(net.a.weight, weights["a.weight"].bfloat16())
    assert torch.equal(net.norm1.weight, weights["norm1.weight"])
    assert torch.equal(net.kept, weights["kept"].bfloat16())
    assert torch.equal(net.table, torch.arange(5.0))
    assert checkpoint.bytes_read == sum(v.nbytes for k, v in weights.items() if k != "unwanted")
    assert not any(p.requires_grad for p in net.parameters())


def test_parameters_stored_as_one_tensor_are_read_as_rows_of_it(tmp_path):
    stored = torch.arange(24.0).reshape(8, 3)
    save_file({"both": stored}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    net = empty_module(lambda: nn.ModuleDict({"q": nn.Linear(3, 4, False), "k": nn.Linear(3, 4, False)}))
    rows = {"q.weight": slice(0, 4), "k.weight": slice(4, 8)}
    load_weights(net, checkpoint, dtype=torch.float32, rename=lambda name: ("both", rows[name]))
    assert torch.equal(net["q"].weight, stored[:4])
    assert torch.equal(net["k"].weight, stored[4:])
    assert checkpoint.bytes_read == stored.nbytes
    with pytest.raises(ValueError, match=r"both must have shape \(4, 3\), got \(2, 3\)"):
        load_weights(net, checkpoint, dtype=torch.float32, rename=lambda name: ("both", slice(6, 10)))


def test_lacking_and_misshapen_tensors_are_named(saved):
    root, weights = saved
    with pytest.raises(ValueError, match=r"lacks 5 of the 5 tensors of Net, first other\."):
        load_weights(empty_module(Net), Checkpoint.open(str(root)), dtype=torch.float32, rename=lambda n: f"other.{n}")
    save_file({**weights, "a.weight": torch.zeros(3, 4)}, root / "model.safetensors")
    with pytest.raises(ValueError, match=r"a.weight must have shape \(4, 3\), got \(3, 4\)"):
        load_weights(empty_module(Net), Checkpoint.open(str(root)), dtype=torch.float32)


def test_broken_weights_are_named(saved):
    root, _ = saved
    whole = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(empty_module(Net), Checkpoint.open(str(root)), dtype=torch.float32)
    (root / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        load_weights(empty_module(Net), Checkpoint.open(str(root)), dtype=torch.float32)


def test_a_missing_shard_is_named(wan_path, tmp_path):
    root = tmp_path / "wan"
    shutil.copytree(wan_path, root)
    shard = sorted((root / "transformer").glob("*.safetensors"))[-1]
    shard.unlink()
    from spatialprobe.engine.adapters.wan import Wan

    wan = Wan(Checkpoint.open(str(root)), {**Wan.OPTIONS, "size": (64, 96)})
    with pytest.raises(ValueError, match=f"no file transformer/{shard.name}"):
        wan.load(wan.num_layers, torch.device("cpu"), torch.float32, tmp_path)


def test_content_hash_sees_weights_and_configs_and_not_the_place(wan_path, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(wan_path, copy)
    base = content_hash(wan_path)
    assert content_hash(copy) == base
    file = next((copy / "vae").glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    changed = content_hash(copy)
    assert changed != base
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps(config | {"z_dim": 17}))
    assert content_hash(copy) not in (base, changed)


def test_family_comes_from_the_checkpoints_own_configs(wan_path, qwen_path, tmp_path):
    assert detect_family(Checkpoint.open(str(wan_path))) == "wan"
    assert detect_family(Checkpoint.open(str(qwen_path))) == "qwen3_vl"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"says it is bert .* known are WanPipeline, .*qwen3_vl, "):
        detect_family(Checkpoint.open(str(tmp_path)))


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("Qwen/no-such-model", None, "not in the local Hub cache, and the Hub cannot be reached"),
        ("a/b/c", None, "no local folder, and no Hub id"),
        (".", "main", "revision 'main' is for models from the Hub"),
    ],
)
def test_models_that_cannot_be_had(model, revision, message):
    with pytest.raises(ValueError, match=message) as raised:
        Checkpoint.open(model, revision)
    assert "\n" not in str(raised.value)


def test_hub_layout_is_read_from_the_local_cache(wan_path, tmp_path, monkeypatch):
    """A cached Hub snapshot: same files, identity by commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--owner--wan"
    shutil.copytree(wan_path, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open("owner/wan")
    assert checkpoint.identity == f"hub:owner/wan@{commit}"
    assert checkpoint.tensor_files("transformer") == Checkpoint.open(str(wan_path)).tensor_files("transformer")
    with pytest.raises(ValueError, match=r"owner/wan/absent\.json is not in the local Hub cache"):
        checkpoint.file("absent.json")


def test_from_the_hub_only_files_of_wanted_blocks_are_fetched(wan_path, tmp_path, monkeypatch):
    """A Hub that serves a local folder: configs at once, then just the shards that hold the first block and the VAE."""
    import fnmatch

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    from spatialprobe.engine.adapters.wan import Wan

    commit, fetched = "f" * 40, []
    cache = tmp_path / "cache" / commit

    def fetch(name):
        if not (wan_path / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(wan_path / name, cache / name)
        fetched.append(name)

    def served(name):
        if not (wan_path / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        return {tensor: SimpleNamespace(shape=x.shape) for tensor, x in load_file(wan_path / name).items()}

    def snapshot_download(repo, revision=None, allow_patterns=()):
        names = [str(p.relative_to(wan_path)) for p in wan_path.rglob("*") if p.is_file()]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                fetch(name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, revision: fetch(name) or cache / name)
    metadata = lambda self, repo, name, revision: SimpleNamespace(tensors=served(name))  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", metadata)
    wan = Wan(Checkpoint.open("owner/wan"), {**Wan.OPTIONS, "size": (64, 96)})
    assert not any(name.endswith(".safetensors") for name in fetched)
    wan.load(1, torch.device("cpu"), torch.float32, tmp_path / "prompts")
    index = json.loads(next((wan_path / "transformer").glob("*.index.json")).read_text())["weight_map"]
    wanted = {f for name, f in index.items() if not name.startswith(("blocks.1.", "blocks.2.", "blocks.3."))}
    shards = {name for name in fetched if name.startswith("transformer/") and name.endswith(".safetensors")}
    assert shards == {f"transformer/{f}" for f in wanted}
    assert len(shards) < len(set(index.values()))
    assert wan.checkpoint.identity == f"hub:owner/wan@{commit}"


def test_pickled_weights_and_code_of_a_checkpoint_are_never_used(wan_path, qwen_path, tmp_path):
    from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
    from spatialprobe.engine.adapters.wan import Wan

    cpu = torch.device("cpu")
    shutil.copytree(wan_path, tmp_path / "wan")
    weights = tmp_path / "wan/text_encoder/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    wan = Wan(Checkpoint.open(str(tmp_path / "wan")), {**Wan.OPTIONS, "size": (64, 96)})
    with pytest.raises(ValueError, match="text_encoder cannot be loaded") as raised:
        wan.load(1, cpu, torch.float32, tmp_path / "cache")
    assert "\n" not in str(raised.value)

    shutil.copytree(qwen_path, tmp_path / "qwen")
    config = tmp_path / "qwen/tokenizer_config.json"
    changed = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    (tmp_path / "qwen/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    qwen = Qwen3VL(Checkpoint.open(str(tmp_path / "qwen")), {**Qwen3VL.OPTIONS, "size": (64, 96)})
    try:
        qwen.load(1, cpu, torch.float32, tmp_path / "cache")
    except ValueError as error:
        assert "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


def test_broken_text_encoders_tokenizers_and_configs_are_one_line(wan_path, qwen_path, tmp_path):
    from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
    from spatialprobe.engine.adapters.wan import Wan
    from spatialprobe.engine.job import Job
    from spatialprobe.engine.resolve import resolve

    cpu = torch.device("cpu")
    shutil.copytree(wan_path, tmp_path / "wan")
    weights = tmp_path / "wan/text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    wan = Wan(Checkpoint.open(str(tmp_path / "wan")), {**Wan.OPTIONS, "size": (64, 96)})
    with pytest.raises(ValueError, match="text_encoder cannot be loaded: "):
        wan.load(1, cpu, torch.float32, tmp_path / "cache")

    shutil.copytree(qwen_path, tmp_path / "qwen")
    tokenizer = tmp_path / "qwen/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|image_pad|>", "<|picture|>"))
    qwen = Qwen3VL(Checkpoint.open(str(tmp_path / "qwen")), {**Qwen3VL.OPTIONS, "size": (64, 96)})
    with pytest.raises(ValueError, match="does not know"):
        qwen.load(1, cpu, torch.float32, tmp_path / "cache")

    config = json.loads((tmp_path / "qwen/config.json").read_text())
    del config["vision_config"]
    (tmp_path / "qwen/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have a table vision_config, got None"):
        resolve(Job.from_words({"clips": "c", "model": str(tmp_path / "qwen"), "out": "o", "layers": "0"}))


def test_one_file_may_be_named_and_its_shapes_are_read_from_the_header(saved):
    root, weights = saved
    (root / "model.safetensors").rename(root / "Net_v2.safetensors")
    checkpoint, net = Checkpoint.open(str(root)), empty_module(Net)
    assert checkpoint.shapes("Net_v2.safetensors") == {name: tuple(value.shape) for name, value in weights.items()}
    load_weights(net, checkpoint, "Net_v2.safetensors", dtype=torch.float32)
    assert torch.equal(net.a.weight, weights["a.weight"])
    with pytest.raises(ValueError, match=r"has no file Net_v3\.safetensors"):
        checkpoint.shapes("Net_v3.safetensors")
    (root / "text.safetensors").write_text("no header in this file")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.shapes("text.safetensors")


def test_shapes_of_a_file_on_the_hub_come_without_its_tensors(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def metadata(self, repo, name, *, revision):
        if name == "part/model.safetensors":
            raise huggingface_hub.errors.EntryNotFoundError(f"no {name}")
        asked.append((repo, name, revision))
        return SimpleNamespace(tensors={"a": SimpleNamespace(shape=[2, 3])})

    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", metadata)
    checkpoint = Checkpoint(tmp_path, repo="owner/name", revision="f" * 40)
    assert checkpoint.shapes("big.safetensors") == {"a": (2, 3)}
    assert asked == [("owner/name", "big.safetensors", "f" * 40)]
    assert checkpoint.tensor_files("part") == {"a": "part/diffusion_pytorch_model.safetensors"}
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"owner/name/big\.safetensors is not in the local Hub cache"):
        checkpoint.shapes("big.safetensors")
