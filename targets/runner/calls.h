// TVM's functions, called as C functions are. A runner may be linked to another C++ library than
// TVM's are (Zig brings its own): what is thrown on one side cannot be caught on the other, and
// nothing may be thrown through it.
#pragma once

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <array>
#include <string>
#include <utility>

namespace mx {

// Calls a function; what it fails with is left for TVM_FFI_CHECK_SAFE_CALL, or for a caller in C.
inline int call_as_c(const tvm::ffi::Function& function, const TVMFFIAny* arguments, int32_t count,
                     TVMFFIAny* result) {
    const auto* object = static_cast<const tvm::ffi::FunctionObj*>(function.get());
    return object->safe_call(const_cast<tvm::ffi::FunctionObj*>(object), arguments, count, result);
}

// Calls a function of TVM. What it fails with is thrown here, as an ffi::Error.
inline tvm::ffi::Any call_packed(const tvm::ffi::Function& function,
                                 const tvm::ffi::AnyView* arguments, size_t count) {
    tvm::ffi::Any result;
    TVM_FFI_CHECK_SAFE_CALL(call_as_c(function, reinterpret_cast<const TVMFFIAny*>(arguments),
                                      static_cast<int32_t>(count),
                                      reinterpret_cast<TVMFFIAny*>(&result)));
    return result;
}

template <typename... Arguments>
tvm::ffi::Any call(const tvm::ffi::Function& function, const Arguments&... arguments) {
    const std::array<tvm::ffi::AnyView, sizeof...(Arguments)> views = {
        tvm::ffi::AnyView(arguments)...};
    return call_packed(function, views.data(), views.size());
}

// The same of a global function.
template <typename... Arguments>
tvm::ffi::Any call(const char* name, const Arguments&... arguments) {
    return call(tvm::ffi::Function::GetGlobalRequired(name), arguments...);
}

inline tvm::ffi::Module load_module(const std::string& path) {
    return call("ffi.ModuleLoadFromFile", tvm::ffi::String(path)).cast<tvm::ffi::Module>();
}

inline tvm::ffi::Optional<tvm::ffi::Function> find_function(const tvm::ffi::Module& module,
                                                            const char* name) {
    return call("ffi.ModuleGetFunction", module, tvm::ffi::String(name), false)
        .cast<tvm::ffi::Optional<tvm::ffi::Function>>();
}

// A function for TVM to call, which may throw.
template <typename Callable>
tvm::ffi::Function offer(Callable callable) {
    using tvm::ffi::Function;
    return Function::FromExternC(
        new Function(Function::FromTyped(std::move(callable))),
        [](void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
            return call_as_c(*static_cast<Function*>(self), arguments, count, result);
        },
        [](void* self) { delete static_cast<Function*>(self); });
}

}  // namespace mx
