"""Words by which reports and their readers know who was measured. No torch is imported for them."""

OURS = "fused_sched"
ROOF = "roof"
RIVAL = "torch fused"
CPU_ADAM = "DeepSpeed CPUAdam"
