"""The method of the paper in plain torch, shared by the ComfyUI nodes and by training."""
