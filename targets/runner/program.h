// Running a compiled program on TVM's runtime: as mxcompile/runtime.py, which says how it is called.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "artifact.h"

namespace mx {

// Memory for tensors, zeroed, that begins where kernels may use vector loads.
class Block {
public:
    explicit Block(size_t bytes);
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    char* data() const { return static_cast<char*>(data_); }

private:
    void* data_ = nullptr;
    size_t bytes_;
};

// An array of the caller's or of a program's output.
struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    const void* data = nullptr;
    std::shared_ptr<const void> owner;  // of the data, if it is not the caller's

    size_t bytes() const;
};

// Runs the kernels of this process on `count` threads from now on; 0 means one a physical core.
void set_threads(int count);

class Program {
public:
    // Loads the artifact in `folder`; its weights are mapped, not read.
    explicit Program(const std::string& folder);

    const Artifact& artifact() const { return artifact_; }
    const Manifest& manifest() const { return artifact_.manifest; }

    // Runs on arrays by name; a decoder starts with empty caches and gives all logits.
    std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& feeds);

private:
    friend class Session;

    // Calls the program, with the weights behind the arguments. Throws Error for what TVM says.
    tvm::ffi::Any call(std::vector<tvm::ffi::Any> arguments);
    void check_feeds(const std::map<std::string, Tensor>& feeds,
                     const std::vector<TensorSpec>& specs) const;

    Artifact artifact_;
    tvm::ffi::Array<tvm::ffi::Tensor> weights_;
    tvm::ffi::Function main_;
};

// A decoder with the caches of one sequence.
class Session {
public:
    // The longest sequence is `context` tokens; 0 means what the model can.
    Session(Program& program, int64_t context);

    // Runs `count` tokens after those before. Gives the logits after the last of them, which are
    // valid until the next call.
    const float* feed(const uint32_t* tokens, size_t count);
    // The same, and gives the logits after each of them, one after another.
    std::vector<float> feed_all(const uint32_t* tokens, size_t count);

    // Forgets all but the first `length` tokens.
    void truncate(int64_t length) { length_ = std::min(length_, std::max<int64_t>(length, 0)); }

    int64_t length() const { return length_; }
    int64_t vocabulary() const { return program_.manifest().vocabulary; }

private:
    // The small inputs of a step of `size` tokens, made once and refilled.
    struct Inputs {
        explicit Inputs(int64_t size);
        int64_t size;
        tvm::ffi::Tensor ids, positions, past, all, last;
    };

    void check(const uint32_t* tokens, size_t count);
    tvm::ffi::Tensor step(const uint32_t* tokens, int64_t count, bool all);
    void reserve(int64_t need);

    Program& program_;
    int64_t context_, length_ = 0, capacity_ = 0;
    tvm::ffi::Array<tvm::ffi::Tensor> caches_;
    Inputs one_{1};
    std::unique_ptr<Inputs> many_;
    tvm::ffi::Tensor logits_;  // of the last step
};

}  // namespace mx
