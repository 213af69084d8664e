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

// The numbers of a text like "1,2".
std::vector<int> numbers(const ffi::String& text) {
    std::vector<int> found;
    for (const char* at = text.c_str(); *at != '\0'; at += *at == ',') {
        char* end = nullptr;
        found.push_back(static_cast<int>(std::strtol(at, &end, 10)));
        at = end;
    }
    return found;
}

// The rows of a benchmark as JSON; `threads` may be empty for one a physical core.
ffi::String bench(const ffi::String& model, int64_t prompt, int64_t generated,
                  const ffi::String& threads, const ffi::String& depths, int64_t repetitions) {
    const mx::ModelHandle opened = mx::open_model(model);
    return mx::bench(opened.get(),
                     {prompt, generated, numbers(threads), numbers(depths), repetitions});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bench, bench);
