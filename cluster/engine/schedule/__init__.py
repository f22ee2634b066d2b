"""What the next step computes and what its result changes: plans, queues, fair shares, preemption, step times.
Runs nothing: that is run/'s. Blocks are counted in kv_cache/.
"""
