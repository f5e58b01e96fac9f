"""Speed and memory of the nodes against a bare UNet, inside a real ComfyUI: `python -m bench`."""
