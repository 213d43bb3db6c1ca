"""examples/accelerate: files that accelerate takes, and launches with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from hf_integration import load_training_checkpoint
from lightning_quant.export import verify
from tests.integration.processes import DEEPSPEED, ROOT

HERE = ROOT / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_every_file_is_tested():
    assert {p.stem for p in HERE.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_takes_it(name):
    file = HERE / f"{name}.yaml"
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8
    words = ["--config_file", str(file), "--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"]
    words += ["--main_process_ip", "node1", "--main_process_port", "29500", "--rdzv_backend", "c10d", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.num_processes, args.machine_rank, args.mixed_precision) == (16, 1, "bf16")
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name.startswith("zero"))
    if args.use_deepspeed:
        assert args.zero_stage == int(name[-1])
    if args.use_fsdp:
        assert args.fsdp_version == 2


def test_the_batch_script_is_bash():
    done = subprocess.run(["bash", "-n", str(HERE / "train.sbatch")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_batch_script_continues_where_the_last_whole_checkpoint_is(tmp_path):
    """With commands of its own in place of SLURM's and accelerate's: what would be launched on the second node."""
    for step, files in ((9, ["trainer_state.json"]), (10, ["trainer_state.json"]), (11, [])):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        for file in files:
            (tmp_path / "out" / f"checkpoint-{step}" / file).touch()
    commands = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'shift; exec "$@"',
        "accelerate": "printf '%s\\n' \"$@\"",
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "7", "NODEID": "1"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **{f"SLURM_{name}": value for name, value in slurm.items()}}

    def launched(out: Path) -> list[str]:
        words = ["bash", HERE / "train.sbatch", "zero3.yaml", "run.py", "--quant", "pege", "--output_dir", out]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, check=True)
        return done.stdout.split("\n")[:-1]

    first = (
        "launch --config_file zero3.yaml --num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip node1"
    )
    first += (
        f" --main_process_port 20007 --rdzv_backend c10d -m hf_integration run.py --quant pege --output_dir {tmp_path}"
    )
    assert launched(tmp_path / "new") == f"{first}/new".split(" ")
    resumed = f"{first}/out --resume_from_checkpoint {tmp_path}/out/checkpoint-10"
    assert launched(tmp_path / "out") == resumed.split(" ")


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_launched_with_two_processes(tmp_path, name):
    """The file as it is, on CPUs in float32: one flag for each."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= DEEPSPEED if name == "zero3" else {"ACCELERATE_USE_CPU": "true"}
    words = f"-m accelerate.commands.launch --config_file {HERE / name}.yaml --num_processes 2 --mixed_precision no"
    words += f" -m hf_integration {ROOT / 'examples' / 'causal_lm.py'} --quant pege --quant_scheme w4a16-g32"
    words += f" --quant_export {tmp_path / 'int4'} --output_dir {tmp_path / 'out'} --do_train --max_steps 3 --use_cpu"
    words += " --per_device_train_batch_size 4 --report_to none --ddp_backend gloo --save_steps 3 --logging_steps 1"
    command = [sys.executable, *words.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    state = yaml.safe_load((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2  # one for each process
    assert len(list(checkpoint.glob("global_step3/*zero_pp_rank_*_optim_states.pt"))) == (2 if name == "zero3" else 0)
    assert verify(tmp_path / "int4", load_training_checkpoint(tmp_path / "out")).ok
