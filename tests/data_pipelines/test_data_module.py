import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

import data_pipelines
from data_pipelines import DataConfig, DataError, open_data
from data_pipelines.data_module import TextDataModule


@pytest.fixture(scope="module")
def packed(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": f"{n} {n**20}"}) + "\n" for n in range(30)))
    return open_data(DataConfig(reference=str(folder), length=8), tokenizer, seed=3, cache_dir=folder)


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_importing_the_package_is_cheap():
    heavy = "{'lightning', 'datasets', 'webdataset', 'pyarrow', 'transformers'}"
    code = f"import sys, data_pipelines; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data_pipelines.__file__).parents[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_from_any_start(packed, workers):
    state = torch.get_rng_state()
    module = TextDataModule(packed, steps=9, rows_per_step=4, start_step=5, num_workers=workers)
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    for step, batch in enumerate(batches, start=5):
        assert_same(batch, packed.batch(step, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(TextDataModule(packed, steps=5, rows_per_step=4, start_step=5).train_dataloader()) == []


def of_rank(packed, rank, world):
    module = TextDataModule(packed, steps=3, rows_per_step=6)
    module.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": world})
    return module.train_dataloader()


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_rows_of_a_step(packed, world):
    for step, parts in enumerate(zip(*(of_rank(packed, rank, world) for rank in range(world)), strict=True)):
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert_same(whole, packed.batch(step, 6))


def test_ranks_that_cannot_share_equally(packed):
    with pytest.raises(DataError, match=r"^rows_per_step 6 is not a multiple of the 4 [^\n]* ranks; use 8$"):
        of_rank(packed, 0, 4)


class Recorder(lightning.LightningModule):
    """Writes down every batch that it is given."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch, index):
        torch.save(batch, self.folder / f"{index}-{self.trainer.global_rank}.pt")
        return self.weight * 1.0


def trainer(**settings) -> lightning.Trainer:
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(shown, False), **settings)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_gets_every_step_once(packed, tmp_path, ranks):
    """Lightning deals out the steps of other data loaders among the ranks."""
    module = TextDataModule(packed, steps=7, rows_per_step=4, start_step=4)
    strategy = "ddp_spawn" if ranks > 1 else "auto"
    trainer(devices=ranks, strategy=strategy).fit(Recorder(tmp_path), datamodule=module)
    assert len(list(tmp_path.iterdir())) == 3 * ranks
    for index in range(3):
        parts = [torch.load(tmp_path / f"{index}-{rank}.pt", weights_only=True) for rank in range(ranks)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert_same(whole, packed.batch(4 + index, 4))
