"""Schedules of torch.optim.lr_scheduler under their own names."""
