#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "calls.h"
#include "cpu.h"
#include "error.h"
#include "safetensors.h"

namespace mx {
namespace {

namespace ffi = tvm::ffi;

constexpr size_t kAlignment = 64;      // a cache line, and the widest vector
constexpr int64_t kChunk = 256;        // tokens of a prompt that are run at once
constexpr int64_t kFirstCapacity = 512;  // tokens that new caches hold before they grow
constexpr int kPooled = 2;             // TVM's number of the allocator that keeps freed memory
constexpr int kShareCores = -3;        // its affinity mode in which no thread is bound to a core
constexpr DLDevice kCpu = {kDLCPU, 0};

// What TVM throws, in one line.
[[noreturn]] void complain(const std::string& where, const ffi::Error& error) {
    std::string text = error.message();
    text = text.substr(0, std::min(text.find('\n'), size_t{300}));
    fail(where + ": " + text);
}

DLDataType dl_type(const DType& type) {
    const int code = type.kind == 'f' ? kDLFloat : type.kind == 'i' ? kDLInt
                     : type.kind == 'u' ? kDLUInt : kDLBool;
    return {static_cast<uint8_t>(code), static_cast<uint8_t>(type.bits), 1};
}

std::string type_name(DLDataType type) {
    if (type.code == kDLBool) return "bool";
    const char* kind = type.code == kDLFloat ? "float" : type.code == kDLInt ? "int" : "uint";
    return kind + std::to_string(type.bits);
}

// Gives a tensor memory that is another's.
struct Lend {
    std::shared_ptr<const void> owner;
    const char* data;
    void AllocData(DLTensor* tensor) { tensor->data = const_cast<char*>(data); }
    void FreeData(DLTensor*) { owner.reset(); }
};

ffi::Tensor lend(std::shared_ptr<const void> owner, const char* data,
                 const std::vector<int64_t>& shape, const DType& type) {
    return ffi::Tensor::FromNDAlloc(Lend{std::move(owner), data},
                                    ffi::ShapeView(shape.data(), shape.size()), dl_type(type), kCpu);
}

size_t size_of(const std::vector<int64_t>& shape, const DType& type) {
    auto size = static_cast<uint64_t>(type.bytes());
    for (const int64_t dimension : shape) {
        if (dimension < 0 || __builtin_mul_overflow(size, static_cast<uint64_t>(dimension), &size)) {
            fail("a tensor is too large for this machine");
        }
    }
    return size;
}

ffi::Tensor zeros(const std::vector<int64_t>& shape, const DType& type) {
    auto block = std::make_shared<Block>(size_of(shape, type));
    return lend(block, block->data(), shape, type);
}

// A tensor on the memory of `data`, or on a copy if that is not aligned.
ffi::Tensor share(std::shared_ptr<const void> owner, const char* data,
                  const std::vector<int64_t>& shape, const DType& type) {
    if (reinterpret_cast<uintptr_t>(data) % kAlignment == 0) {
        return lend(std::move(owner), data, shape, type);
    }
    ffi::Tensor copy = zeros(shape, type);
    if (const size_t size = size_of(shape, type)) std::memcpy(copy.data_ptr(), data, size);
    return copy;
}

int64_t* numbers(const ffi::Tensor& tensor) { return static_cast<int64_t*>(tensor.data_ptr()); }

Tensor to_output(const ffi::Tensor& tensor) {
    if (!tensor.IsContiguous()) fail("an output is not contiguous");
    Tensor out;
    out.dtype = type_name(tensor.dtype());
    out.shape.assign(tensor.shape().begin(), tensor.shape().end());
    out.data = tensor.data_ptr();
    out.owner = std::make_shared<ffi::Tensor>(tensor);
    return out;
}

}  // namespace

Block::Block(size_t bytes) : bytes_(std::max(bytes, kAlignment)) {
    // Fresh pages are zero, and cost nothing until they are used.
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) fail("out of memory: " + std::to_string(bytes_) + " bytes");
    data_ = data;
}

Block::~Block() { munmap(data_, bytes_); }

size_t Tensor::bytes() const {
    const auto type = find_dtype(dtype);
    if (!type) fail("the type " + dtype + " is not known");
    return size_of(shape, *type);
}

void set_threads(int count) {
    const std::vector<int> cpus = usable_cpus();
    if (count == 0) count = physical_cores();
    if (count < 1 || count > static_cast<int>(cpus.size())) {
        fail(std::to_string(count) + " threads: this process can use 1 to " +
             std::to_string(cpus.size()));
    }
    // The list gives the pool a worker a CPU and lets the workers move, as runtime.py explains.
    ffi::Array<ffi::String> names;
    for (const int cpu : cpus) names.push_back(std::to_string(cpu));
    mx::call("runtime.config_threadpool", kShareCores, count, names);
}

Program::Program(const std::string& folder) : artifact_(open_artifact(folder)) {
    const std::shared_ptr<Mapping> file = artifact_.files.at(kWeights);
    const auto found = read_safetensors(file->bytes(), artifact_.path(kWeights));
    for (const std::string& name : manifest().weights) {
        const auto weight = found.find(name);
        if (weight == found.end()) fail(artifact_.path(kWeights) + " has no tensor " + name);
        const auto& [dtype, shape, bytes] = weight->second;
        weights_.push_back(share(file, bytes.data(), shape, *find_dtype(dtype)));
    }
    const std::string code = artifact_.path(kCode);
    try {
        // A bare name would be searched for among the system's libraries.
        const ffi::Module library = load_module(code[0] == '/' ? code : "./" + code);
        const auto load = find_function(library, "vm_load_executable");
        if (!load) fail(code + " holds no program");
        const auto machine = mx::call(*load).cast<ffi::Module>();
        const auto initialize = find_function(machine, "vm_initialization").value();
        mx::call(initialize, static_cast<int>(kDLCPU), 0, kPooled);
        const auto main = find_function(machine, "main");
        if (!main) fail(code + " has no function main");
        main_ = *main;
    } catch (const ffi::Error& error) {
        complain(code, error);
    }
}

ffi::Any Program::call(std::vector<ffi::Any> arguments) {
    arguments.emplace_back(weights_);
    std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
    try {
        return call_packed(main_, views.data(), views.size());
    } catch (const ffi::Error& error) {
        complain(artifact_.folder + " does not fit its program", error);
    }
}

void Program::check_feeds(const std::map<std::string, Tensor>& feeds,
                          const std::vector<TensorSpec>& specs) const {
    std::string expected = "; expected ";
    for (size_t i = 0; i < specs.size(); ++i) expected += (i != 0 ? ", " : "") + specs[i].text();
    std::map<std::string, int64_t> sizes;
    std::map<std::string, bool> known;
    for (const TensorSpec& spec : specs) known[spec.name] = true;
    std::string wrong;
    for (const auto& [name, known_name] : known) {
        if (feeds.count(name) == 0) wrong += (wrong.empty() ? "" : ", ") + name;
    }
    for (const auto& [name, tensor] : feeds) {
        if (known.count(name) == 0) wrong += (wrong.empty() ? "" : ", ") + name;
    }
    if (!wrong.empty()) fail("inputs missing or unknown: " + wrong + expected);
    for (const TensorSpec& spec : specs) {
        const Tensor& tensor = feeds.at(spec.name);
        bool fits = tensor.dtype == spec.dtype && tensor.shape.size() == spec.shape.size();
        TensorSpec found = {spec.name, tensor.dtype, {}};
        for (size_t i = 0; i < tensor.shape.size(); ++i) {
            const std::string size = std::to_string(tensor.shape[i]);
            found.shape.push_back(size);
            if (!fits) continue;
            const std::string& wanted = spec.shape[i];
            fits = wanted[0] == '\'' ? sizes.emplace(wanted, tensor.shape[i]).first->second ==
                                           tensor.shape[i]
                                     : wanted == size;
        }
        if (!fits) fail("input " + found.text() + " does not fit" + expected);
    }
}

std::map<std::string, Tensor> Program::run(const std::map<std::string, Tensor>& feeds) {
    std::map<std::string, Tensor> outputs;
    if (manifest().decoder) {
        check_feeds(feeds, {{"input_ids", "int64", {"1", "'seq"}}});
        const Tensor& input = feeds.at("input_ids");
        std::vector<uint32_t> tokens;
        for (int64_t i = 0; i < input.shape[1]; ++i) {
            const int64_t token = static_cast<const int64_t*>(input.data)[i];
            tokens.push_back(static_cast<uint32_t>(std::clamp<int64_t>(token, -1, UINT32_MAX)));
        }
        Session session(*this, 0);
        auto logits = std::make_shared<std::vector<float>>(
            session.feed_all(tokens.data(), tokens.size()));
        outputs["logits"] = {
            "float32", {1, input.shape[1], session.vocabulary()}, logits->data(), logits};
        return outputs;
    }
    check_feeds(feeds, manifest().inputs);
    std::vector<ffi::Any> arguments;
    for (const TensorSpec& spec : manifest().inputs) {
        const Tensor& tensor = feeds.at(spec.name);
        tensor.bytes();  // checks the type
        arguments.emplace_back(share(tensor.owner,
                                     static_cast<const char*>(tensor.data), tensor.shape,
                                     *find_dtype(tensor.dtype)));
    }
    const ffi::Any result = call(std::move(arguments));
    std::vector<ffi::Tensor> found;
    if (const auto one = result.as<ffi::Tensor>()) {
        found.push_back(*one);
    } else if (const auto several = result.as<ffi::Array<ffi::Tensor>>()) {
        found.assign(several->begin(), several->end());
    }
    if (found.size() != manifest().outputs.size()) {
        fail(artifact_.folder + " gives " + std::to_string(found.size()) + " outputs, not " +
             std::to_string(manifest().outputs.size()));
    }
    for (size_t i = 0; i < found.size(); ++i) {
        outputs[manifest().outputs[i].name] = to_output(found[i]);
    }
    return outputs;
}

Session::Inputs::Inputs(int64_t size)
    : size(size),
      ids(zeros({1, size}, *find_dtype("int64"))),
      positions(zeros({1, size}, *find_dtype("int64"))),
      past(zeros({1}, *find_dtype("int64"))),
      all(zeros({size}, *find_dtype("int64"))),
      last(zeros({1}, *find_dtype("int64"))) {
    for (int64_t i = 0; i < size; ++i) numbers(all)[i] = i;
    numbers(last)[0] = size - 1;
}

Session::Session(Program& program, int64_t context) : program_(program), context_(context) {
    const Manifest& manifest = program.manifest();
    if (!manifest.decoder) fail(program.artifact().folder + " is not a language model");
    if (context_ == 0) context_ = manifest.context;
    if (context_ < 1 || context_ > manifest.context) {
        fail("a context of " + std::to_string(context_) + " tokens: the model takes 1 to " +
             std::to_string(manifest.context));
    }
}

void Session::check(const uint32_t* tokens, size_t count) {
    if (count == 0) fail("no tokens to run");
    for (size_t i = 0; i < count; ++i) {
        if (tokens[i] >= vocabulary()) {
            fail("a token is not between 0 and " + std::to_string(vocabulary() - 1));
        }
    }
    if (count > static_cast<size_t>(context_ - length_)) {
        fail(std::to_string(static_cast<size_t>(length_) + count) +
             " tokens do not fit the context of " + std::to_string(context_));
    }
    reserve(length_ + static_cast<int64_t>(count));
}

const float* Session::feed(const uint32_t* tokens, size_t count) {
    check(tokens, count);
    for (size_t at = 0; at < count; at += kChunk) {
        const size_t size = std::min(count - at, static_cast<size_t>(kChunk));
        logits_ = step(tokens + at, static_cast<int64_t>(size), false);
    }
    return static_cast<const float*>(logits_.data_ptr());
}

std::vector<float> Session::feed_all(const uint32_t* tokens, size_t count) {
    check(tokens, count);
    std::vector<float> found;
    found.reserve(count * static_cast<size_t>(vocabulary()));
    for (size_t at = 0; at < count; at += kChunk) {
        const size_t size = std::min(count - at, static_cast<size_t>(kChunk));
        logits_ = step(tokens + at, static_cast<int64_t>(size), true);
        const auto* row = static_cast<const float*>(logits_.data_ptr());
        found.insert(found.end(), row, row + size * static_cast<size_t>(vocabulary()));
    }
    return found;
}

ffi::Tensor Session::step(const uint32_t* tokens, int64_t count, bool all) {
    if (count != 1 && (many_ == nullptr || many_->size != count)) {
        many_ = std::make_unique<Inputs>(count);
    }
    const Inputs& inputs = count == 1 ? one_ : *many_;
    for (int64_t i = 0; i < count; ++i) {
        numbers(inputs.ids)[i] = tokens[i];
        numbers(inputs.positions)[i] = length_ + i;
    }
    numbers(inputs.past)[0] = length_;
    const ffi::Any result = program_.call(
        {inputs.ids, inputs.positions, inputs.past, all ? inputs.all : inputs.last, caches_});
    const auto logits = result.as<ffi::Tensor>();
    const std::vector<int64_t> expected = {1, all ? count : 1, vocabulary()};
    const bool fits = logits && type_name(logits->dtype()) == "float32" && logits->IsContiguous() &&
                      std::equal(logits->shape().begin(), logits->shape().end(), expected.begin(),
                                 expected.end());
    if (!fits) {
        fail(program_.artifact().folder + " does not fit its program: logits are not float32[1, " +
             std::to_string(expected[1]) + ", " + std::to_string(vocabulary()) + "]");
    }
    length_ += count;
    return *logits;
}

// Makes room for `need` tokens; the room doubles, so that its cost stays in proportion.
void Session::reserve(int64_t need) {
    if (need <= capacity_) return;
    int64_t capacity = std::max(2 * capacity_, kFirstCapacity);
    while (capacity < need) capacity *= 2;
    capacity = std::min(capacity, context_);
    ffi::Array<ffi::Tensor> grown;
    for (const auto& [dtype, heads, columns] : program_.manifest().caches) {
        ffi::Tensor cache = zeros({1, heads, capacity, columns}, dtype);
        if (capacity_ != 0) {
            const auto row = static_cast<size_t>(columns * dtype.bytes());
            const auto old = static_cast<int64_t>(grown.size());
            const auto* from = static_cast<const char*>(caches_[old].data_ptr());
            auto* to = static_cast<char*>(cache.data_ptr());
            for (int64_t head = 0; head < heads; ++head) {
                std::memcpy(to + static_cast<size_t>(head * capacity) * row,
                            from + static_cast<size_t>(head * capacity_) * row,
                            static_cast<size_t>(length_) * row);
            }
        }
        grown.push_back(std::move(cache));
    }
    caches_ = std::move(grown);
    capacity_ = capacity;
}

}  // namespace mx
