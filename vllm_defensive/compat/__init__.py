"""Everything that leans on how vLLM is made inside: the patches, the registrations, the side channels.

Each patch says why it is there, how it is kept harmless, and until when it is needed. With the flag absent only the two
marked *inert* are installed, and they pass every call through unchanged.

    contract.py     whether the vLLM that is installed has all that we lean on; names.py lists it, sources.py reads it
    base.py         how a patch is installed; the logger
    serving.py      API servers and the command line: P1 to P4, P6, P7
    scheduling.py   the scheduler's process: the block manager's registration, P8 to P10
    worker.py       workers: attention backends, P5, P11, batches, copies to the device
    channels.py     what rides on vLLM's own messages between the processes
"""
