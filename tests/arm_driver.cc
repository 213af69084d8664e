// Runs compiled kernels and programs for another process: commands on stdin, results on stdout.
//
//   tensor NAME DTYPE DIM,DIM,... BYTES   the bytes follow the line
//   array NAME TENSOR ...                 a list of tensors
//   kernels NAME PATH                     load a library of functions
//   program NAME PATH                     load a library with a Relax program
//   call OUT NAME FUNCTION ARGUMENT ...   OUT names what it returns
//   get NAME                              answers "ok DTYPE DIM,DIM,... BYTES" and the bytes
//
// Every command answers a line: "ok", or "error" and why.
#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr int kCpu = 1;
constexpr int kPooled = 2;
constexpr size_t kAlignment = 64;

struct Allocator {
  void AllocData(DLTensor* tensor) {
    size_t size = ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

class Driver {
 public:
  void Run(const std::string& line) {
    std::istringstream words(line);
    std::string command, name;
    words >> command >> name;
    std::vector<std::string> rest;
    for (std::string word; words >> word;) rest.push_back(word);
    if (command == "tensor") {
      values_[name] = Read(rest.at(0), rest.at(1), std::stoul(rest.at(2)));
    } else if (command == "array") {
      ffi::Array<ffi::Tensor> items;
      for (const auto& item : rest) items.push_back(values_.at(item).cast<ffi::Tensor>());
      values_[name] = items;
    } else if (command == "kernels") {
      values_[name] = ffi::Module::LoadFromFile(rest.at(0));
    } else if (command == "program") {
      ffi::Module library = ffi::Module::LoadFromFile(rest.at(0));
      ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
      machine->GetFunction("vm_initialization").value()(kCpu, 0, kPooled);
      values_[name] = machine;
    } else if (command == "call") {
      ffi::Function function =
          values_.at(rest.at(0)).cast<ffi::Module>()->GetFunction(rest.at(1)).value();
      std::vector<ffi::AnyView> arguments;
      for (size_t i = 2; i < rest.size(); ++i) arguments.push_back(values_.at(rest[i]));
      ffi::Any result;
      function.CallPacked(arguments.data(), static_cast<int>(arguments.size()), &result);
      values_[name] = result;
    } else if (command == "get") {
      Write(values_.at(name).cast<ffi::Tensor>());
      return;
    } else {
      throw std::runtime_error("no command " + command);
    }
    std::cout << "ok\n";
  }

 private:
  static ffi::Tensor Read(const std::string& dtype, const std::string& dims, size_t bytes) {
    std::vector<int64_t> shape;
    std::istringstream sizes(dims);
    for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
    ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(
        Allocator(), ffi::ShapeView(shape.data(), shape.size()), ffi::StringToDLDataType(dtype),
        DLDevice{kDLCPU, 0});
    std::cin.read(static_cast<char*>(tensor.data_ptr()), bytes);
    return tensor;
  }

  static void Write(const ffi::Tensor& tensor) {
    size_t size = ffi::GetDataSize(tensor);
    std::cout << "ok " << ffi::DLDataTypeToString(tensor.dtype()) << " ";
    for (int64_t dim : tensor.shape()) std::cout << dim << ",";
    std::cout << " " << size << "\n";
    std::cout.write(static_cast<const char*>(tensor.data_ptr()), size);
  }

  std::map<std::string, ffi::Any> values_;
};

}  // namespace

int main() {
  Driver driver;
  for (std::string line; std::getline(std::cin, line);) {
    try {
      driver.Run(line);
    } catch (const std::exception& error) {
      std::string text = error.what();
      std::cout << "error " << text.substr(0, text.find('\n')) << "\n";
    }
    std::cout.flush();
  }
}
