"""What differs between Linux, macOS and Windows: locks, the disk, signals, limits, memory and the console.

Nothing else of the package asks which system it runs on. :mod:`mm_rec.system.posix` and :mod:`mm_rec.system.windows`
offer the same names with the same promises; the one that fits is taken here. What Linux alone tells of a process is in
:mod:`mm_rec.system.linux`.
"""

try:
    import fcntl as _fcntl  # noqa: F401 (the systems that have it are those of the module posix)
except ModuleNotFoundError:
    from mm_rec.system.windows import (
        REMOVES_OPEN_FILES,
        SIGNALS,
        address_space_left,
        anonymous_memory,
        claim,
        close_lock,
        cores,
        exit_code,
        is_in_use,
        limit_memory,
        lock_holder,
        name_problem,
        open_files_limit,
        open_folder,
        path_of,
        peak_memory,
        prepare_console,
        read_at,
        rename,
        replace,
        sync,
        sync_descriptor,
        try_lock,
        wait_for_lock,
    )
else:
    from mm_rec.system.posix import (
        REMOVES_OPEN_FILES,
        SIGNALS,
        address_space_left,
        anonymous_memory,
        claim,
        close_lock,
        cores,
        exit_code,
        is_in_use,
        limit_memory,
        lock_holder,
        name_problem,
        open_files_limit,
        open_folder,
        path_of,
        peak_memory,
        prepare_console,
        read_at,
        rename,
        replace,
        sync,
        sync_descriptor,
        try_lock,
        wait_for_lock,
    )

from mm_rec.system.linux import control_group_room, keep_freed_memory, loaded_files, processor_name

__all__ = [
    "REMOVES_OPEN_FILES",
    "SIGNALS",
    "address_space_left",
    "anonymous_memory",
    "claim",
    "close_lock",
    "control_group_room",
    "cores",
    "exit_code",
    "is_in_use",
    "keep_freed_memory",
    "limit_memory",
    "loaded_files",
    "lock_holder",
    "name_problem",
    "open_files_limit",
    "open_folder",
    "path_of",
    "peak_memory",
    "prepare_console",
    "processor_name",
    "read_at",
    "rename",
    "replace",
    "sync",
    "sync_descriptor",
    "try_lock",
    "wait_for_lock",
]
