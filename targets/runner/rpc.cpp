// What `mxcompile bench --rpc` calls on a device: TVM's RPC loads libmxrun.so as a module there.

#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <fstream>

#include "bench.h"
#include "error.h"
#include "handles.h"

namespace {

namespace ffi = tvm::ffi;

// Adds a part to a file: large files come in several.
void append(const ffi::String& path, const ffi::Bytes& part) {
    std::ofstream file(std::string(path), std::ios::binary | std::ios::app);
    file.write(part.data(), static_cast<std::streamsize>(part.size()));
    if (!file.flush()) mx::fail(std::string(path) + " cannot be written");
}

// The rows of a benchmark as JSON; `threads` is like "1,2", or empty for one a physical core.
ffi::String bench(const ffi::String& model, int64_t prompt, int64_t generated,
                  const ffi::String& threads, int64_t repetitions) {
    const mx::ModelHandle opened = mx::open_model(model);
    std::vector<int> counts;
    for (const char* at = threads.c_str(); *at != '\0'; at += *at == ',') {
        char* end = nullptr;
        counts.push_back(static_cast<int>(std::strtol(at, &end, 10)));
        at = end;
    }
    return mx::bench(opened.get(), {prompt, generated, counts, repetitions});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bench, bench);
