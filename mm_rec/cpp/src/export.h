// Functions of the C interface, with the level that a file is compiled for in their names.
#pragma once

#define MM_JOIN(a, b) a##_##b
#define MM_WITH_LEVEL(name, level) MM_JOIN(name, level)
#define MM_EXPORT(result, name) \
    extern "C" __attribute__((visibility("default"))) result MM_WITH_LEVEL(mm_rec_##name, MM_LEVEL)
