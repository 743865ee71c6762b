// Functions of the C interface; those of a file that is compiled for several levels have its level in their names.
#pragma once

#if defined(_WIN32)
#define MM_PUBLIC extern "C" __declspec(dllexport)
#else
#define MM_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

#define MM_JOIN(a, b) a##_##b
#define MM_WITH_LEVEL(name, level) MM_JOIN(name, level)
#define MM_EXPORT(result, name) MM_PUBLIC result MM_WITH_LEVEL(mm_rec_##name, MM_LEVEL)
