# A thin shell: every target is a Python command that works without make too, on Windows as `python -m tools.demo` and so on.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint format types core host editor workflows setup clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo '  ARGS="..." hands options on: make demo ARGS="--image=photo.jpg"'

demo:  ## Upscale one photograph in a real ComfyUI, from nothing
	@$(PYTHON) -m tools.demo $(ARGS)

serve:  ## Open the ComfyUI editor with the pack in it
	@$(PYTHON) -m tools.serve $(ARGS)

test:  ## Run every test there is
	@$(PYTHON) -m tools.test $(ARGS)

lint:  ## ruff
	@$(PYTHON) -m tools.test ruff

format:  ## Let ruff lay out the code
	@$(PYTHON) -m tools.test format

types:  ## pyright
	@$(PYTHON) -m tools.test types

core:  ## Tests that need no ComfyUI: core, parity, training, documents
	@$(PYTHON) -m tools.test core $(ARGS)

host:  ## Node tests inside both ComfyUI versions
	@$(PYTHON) -m tools.test host $(ARGS)

editor:  ## Workflows against live servers, the editor in a browser
	@$(PYTHON) -m tools.test editor $(ARGS)

workflows:  ## Write workflows/*.json and their API twins anew
	@$(PYTHON) -m tools.make_workflows

setup:  ## Make the environment and fetch both ComfyUI versions, nothing else
	@$(PYTHON) -m tools.environment test
	@$(PYTHON) -m tools.hosts

clean:  ## Remove what the commands made: environment, hosts, pictures
	rm -rf .venv .hosts out tests/browser/node_modules
