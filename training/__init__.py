"""Train ClearSR and the small base model it can stand on; the only place that knows diffusers and peft."""
