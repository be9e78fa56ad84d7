// Calls the kernels of a library, argv[1], for another process: requests on stdin, results on stdout.
//
// So a library for another machine is tested under an emulator by the tests of this one, see
// tests/support/remote_kernels.py, which knows the format too.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

struct Argument {
    char kind = 0;  // 'n' null, 'i' whole number, 'f' number, 'b' bytes
    int64_t whole = 0;
    double number = 0;
    std::vector<char> bytes;

    void* at() { return kind == 'n' ? nullptr : bytes.data(); }
    operator int64_t() const { return whole; }
};

void need(void* to, size_t size) {
    if (std::fread(to, 1, size, stdin) != size) std::exit(0);  // the other side has gone
}

Argument read_argument() {
    Argument found;
    need(&found.kind, 1);
    if (found.kind == 'f') need(&found.number, sizeof found.number);
    if (found.kind == 'i' || found.kind == 'b') need(&found.whole, sizeof found.whole);
    if (found.kind == 'b') {
        found.bytes.resize(found.whole);
        need(found.bytes.data(), found.bytes.size());
    }
    return found;
}

using P = void*;
using L = int64_t;
using Attention = int (*)(P, L, P, P, P, L, P, int, int, int, int, P, int);
using CausalAttention = int (*)(P, L, P, P, L, P, L, P, P, P, P, P, int, int, int, int, P, int);
using Quantize = int (*)(P, L, L, P, P, int);
using AddNorm = int (*)(P, P, P, P, L, L, P, P, float, P, P, P, int);
using AccumulateNorm = int (*)(P, P, L, L, P, P, float, int, P, int);
using Rotate = int (*)(P, L, P, L, L, int, int, P, P, P, float, int);
using Activate = int (*)(P, P, P, L, L, int, P, P, P, float, int);

int run(const std::string& name, void* address, std::vector<Argument>& a) {
    const auto whole = [&](int i) { return static_cast<int>(a[i].whole); };
    const auto number = [&](int i) { return static_cast<float>(a[i].number); };
    if (name == "echelon_attention")
        return reinterpret_cast<Attention>(address)(a[0].at(), a[1], a[2].at(), a[3].at(), a[4].at(), a[5], a[6].at(),
                                                    whole(7), whole(8), whole(9), whole(10), a[11].at(), whole(12));
    if (name == "echelon_causal_attention")
        return reinterpret_cast<CausalAttention>(address)(
            a[0].at(), a[1], a[2].at(), a[3].at(), a[4], a[5].at(), a[6], a[7].at(), a[8].at(), a[9].at(), a[10].at(),
            a[11].at(), whole(12), whole(13), whole(14), whole(15), a[16].at(), whole(17));
    if (name == "echelon_quantize")
        return reinterpret_cast<Quantize>(address)(a[0].at(), a[1], a[2], a[3].at(), a[4].at(), whole(5));
    if (name == "echelon_add_norm")
        return reinterpret_cast<AddNorm>(address)(a[0].at(), a[1].at(), a[2].at(), a[3].at(), a[4], a[5], a[6].at(),
                                                  a[7].at(), number(8), a[9].at(), a[10].at(), a[11].at(), whole(12));
    if (name == "echelon_accumulate_norm")
        return reinterpret_cast<AccumulateNorm>(address)(a[0].at(), a[1].at(), a[2], a[3], a[4].at(), a[5].at(),
                                                         number(6), whole(7), a[8].at(), whole(9));
    if (name == "echelon_rotate")
        return reinterpret_cast<Rotate>(address)(a[0].at(), a[1], a[2].at(), a[3], a[4], whole(5), whole(6), a[7].at(),
                                                 a[8].at(), a[9].at(), number(10), whole(11));
    return reinterpret_cast<Activate>(address)(a[0].at(), a[1].at(), a[2].at(), a[3], a[4], whole(5), a[6].at(),
                                               a[7].at(), a[8].at(), number(9), whole(10));
}

}  // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    for (;;) {
        unsigned char sizes[2];  // of the name, and the number of arguments
        need(sizes, sizeof sizes);
        std::string name(sizes[0], ' ');
        need(name.data(), name.size());
        std::vector<Argument> found;
        for (int i = 0; i < sizes[1]; ++i) found.push_back(read_argument());
        void* const address = dlsym(library, name.c_str());
        if (address == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
        const int32_t status = run(name, address, found);
        std::fwrite(&status, sizeof status, 1, stdout);
        for (const Argument& each : found) std::fwrite(each.bytes.data(), 1, each.bytes.size(), stdout);
        std::fflush(stdout);
    }
}
