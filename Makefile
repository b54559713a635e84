# CLaaS on Kubernetes. `make help` lists the targets; each does all its own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
export PYTHONPATH := tests

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.PHONY: python
python:
	@command -v python3.11 >/dev/null && python3.11 -c 'import venv, ensurepip' 2>/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "Python 3.11 with venv is needed: apt-get install python3.11 python3.11-venv" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11 python3.11-venv; }

.PHONY: env
env: python ## the development environment (.venv; dependencies in the cache)
	@python3.11 tests/bootstrap.py >/dev/null

.PHONY: demo
demo: python ## install into a real cluster and train an adapter, start to finish (KEEP=1 leaves it running; KUBECONFIG=… REGISTRY=… uses yours)
	@python3.11 tests/prepare.py
	@$(PY) tests/demo.py

.PHONY: test
test: python ## lint, unit, contract, control-plane, vLLM and end-to-end tests; full images when they changed
	@python3.11 tests/prepare.py --tests
	@$(MAKE) --no-print-directory lint
	$(PY) tests/lanes.py --durations=15 $(if $(KUBECONFIG),,--require-all --images)

.PHONY: stress
stress: python ## what `make test` leaves out: a hundred steps under kills, load, fuzz, an adopted adapter in vLLM (minutes)
	@python3.11 tests/prepare.py --tests
	$(PY) -m pytest tests -q -m stress --stress

.PHONY: test-images
test-images: python ## the one test of the full images: build, import, run a request (15 GB of free disk, minutes)
	@python3.11 tests/prepare.py
	$(PY) -m pytest tests/e2e -q -m images --images

.PHONY: chaos
chaos: python ## the kill matrix, then random users and random kills: SEEDS=50 of them, or SEED=n again (minutes)
	@python3.11 tests/prepare.py --tests
	$(if $(SEED),,$(PY) -m pytest tests/chaos -q --stress)
	$(PY) -m chaos.seeds $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),50))

.PHONY: unit
unit: env ## the tests that need no cluster, no vLLM and no images (a minute)
	$(PY) -m pytest tests -q -m "not controlplane and not vllm and not cluster and not e2e and not images"

.PHONY: mutations
mutations: env ## break every formula of the loss, one at a time, and see a test fail (minutes)
	$(PY) tests/worker/mutations.py

.PHONY: bench-plan
bench-plan: env ## what one plan of the operator costs, with 1,000, 10,000 and 30,000 waiting requests
	$(PY) tests/bench/plan_cost.py --out build/plan.json

.PHONY: model-mutations
model-mutations: env ## take every precondition of the protocol away, one at a time, and see the model of the control plane find it (minutes)
	$(PY) tests/operator/model_mutations.py

.PHONY: learning
learning: env ## does repeated feedback teach? 4 preferences, 3 arms, 3 seeds (hours on two cores; a GPU is used if there is one)
	@mkdir -p build
	$(PY) -m learning run --preferences friend,happy,example,remember --settings '{"samples": 4, "training": {"learningRate": 2e-4}}' --out build/learning.json
	$(PY) -m learning plot --out build/learning.json
	$(PY) -m learning verdict --out build/learning.json

.PHONY: fuzz-api
fuzz-api: env ## ten thousand generated calls of the REST API, and as many valid ones (minutes)
	CLAAS_FUZZ_EXAMPLES=600 $(PY) -m pytest tests/shim/test_fuzz.py -q -s --stress

.PHONY: bench-api
bench-api: env ## 200 callers at once: how late they hear, judged (on an idle machine), and what the API server alone takes; 1,000 that wait
	CLAAS_LATE_SECONDS=0.15 $(PY) -m pytest tests/shim/test_load.py -q -s --stress

# The benches below write build/NAME.json and draw it, a missed bound or not. ARGS=… goes to them; PY=… is another Python
# than the environment's, which has vLLM for processors alone.
bench = rm -f build/$(2).json build/$(2).png; $(PY) tests/bench/$(1) --out build/$(2).json $(ARGS); code=$$?; \
  if [ -e build/$(2).json ]; then $(PY) tests/bench/bench_plots.py build/$(2).json || exit; fi; exit $$code
own_env := $(if $(filter .venv/%,$(PY)),env)

.PHONY: bench-student
bench-student: $(own_env) ## the training step on a GPU against plain PEFT: times, equality, memory, what the time is made of (3 minutes)
	$(call bench,student_step.py --exact --profile --mixed 60,student)

.PHONY: bench-trl
bench-trl: $(own_env) ## the training step on a GPU against the SDPO trainer of TRL, whose packages are fetched for it (minutes)
	$(call bench,step_against_trl.py,trl)

.PHONY: bench-teacher
bench-teacher: $(own_env) ## the teacher's frames on a GPU (PY=… with its vLLM) against its plain prefill and stock JSON, within an A100's memory (minutes)
	$(call bench,teacher_scoring.py --a100,teacher)

.PHONY: bench-warm
bench-warm: $(own_env) ## a warm request end to end on two GPUs (PY=… with their vLLM): created, bound, taught, trained, saved, Complete (minutes)
	$(call bench,warm_request.py,warm)

.PHONY: bench-cold
bench-cold: $(own_env) ## a worker's process on a GPU to its first step, an agent's on a real API server, plain PEFT's beside it (minutes)
	$(call bench,cold_start.py --agent --rounds 4,cold)

.PHONY: bench-operator
bench-operator: python ## 1,000, 10,000 and 30,000 requests through the operator and real agents, judged (long, and on an idle machine)
	@python3.11 tests/prepare.py --tests
	@mkdir -p build && rm -f build/operator-load.json
	for run in 1 2 3; do $(PY) tests/bench/operator_load.py run --requests 1000 || exit 1; done
	$(PY) tests/bench/operator_load.py run --requests 10000 --restart
	$(PY) tests/bench/operator_load.py run --requests 10000 --restart --spec-bytes 16384
	$(PY) tests/bench/operator_load.py run --requests 30000 --no-raw
	$(PY) tests/bench/operator_load.py flood
	$(PY) tests/bench/operator_load.py plot
	$(PY) tests/bench/operator_load.py verdict

.PHONY: kills
kills: env ## kill a teacher's engine in the middle of a scoring, ten times (10 minutes)
	CLAAS_KILLS=10 $(PY) -m pytest tests/teacher/test_deaths.py -q -s

.PHONY: docs
docs: env ## draw the plots of docs/, and write docs/cli.md from the commands
	$(PY) docs/alpha.py
	$(PY) -m claas_operator.cli.reference

.PHONY: lint
lint: env ## ruff, mypy --strict, import-linter, generated files
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()'
	$(PY) -m claas_crds --check

.PHONY: format
format: env ## ruff format, and what ruff can mend
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

.PHONY: crds
crds: env ## write the CRD YAML from the models
	$(PY) -m claas_crds

.PHONY: cluster
cluster: python ## start (or reuse) a real two-node Kubernetes on this machine
	@python3.11 -m cluster up

.PHONY: cluster-down
cluster-down: python ## end it: no process, mount, cgroup or network namespace stays
	@python3.11 -m cluster down

.PHONY: images
images: env ## build the three full images with buildah (BASE=… another base, TAG=…)
	@$(PY) tests/images.py build

.PHONY: push
push: env ## push them: make push REGISTRY=registry.example.com/team
	@$(PY) tests/images.py push $(REGISTRY)

.PHONY: lock
lock: env ## make every hash-locked requirements file anew
	@$(PY) tests/lock.py
