// libFuzzer on one kernel of fuzz.cpp: MM_REC_FUZZ_CASES names the cases of its switch, as "14,15".

#define LLVMFuzzerTestOneInput fuzz_any_kernel
#include "fuzz.cpp"
#undef LLVMFuzzerTestOneInput

#include <string.h>

static std::vector<uint8_t> cases_of_kernel() {
    std::vector<uint8_t> cases;
    const char* names = getenv("MM_REC_FUZZ_CASES");
    for (const char* at = names ? names : "0"; at; at = strchr(at, ',')) {
        if (*at == ',') ++at;
        cases.push_back(uint8_t(atoi(at)));
    }
    return cases;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<uint8_t> cases = cases_of_kernel();
    if (!size) return 0;
    std::vector<uint8_t> bytes(data, data + size);
    bytes[0] = cases[data[0] % cases.size()];
    return fuzz_any_kernel(bytes.data(), bytes.size());
}
