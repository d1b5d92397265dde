// A torch device whose memory is host memory: tests run on it what is meant for GPUs.
//
// Each storage of the device owns a storage of the CPU. An operation gets CPU tensors over the same
// memory, runs as torch's CPU kernel, and what it made is given to the device: nothing is copied.
// As with CUDA, tensors of two devices in one operation are an error, each device has a thread of
// its own for backward passes, and addresses are worth nothing to the host: whoever reads memory
// of the device past torch's operations gets a segmentation fault.
#include <ATen/Functions.h>
#include <ATen/SparseTensorImpl.h>
#include <torch/library.h>

#include <functional>
#include <unordered_map>

#include "memory.h"

namespace {

using namespace hostmem;
using at::DispatchKey;
using at::Tensor;

bool is_here(const Tensor& t) {
  return t.defined() && t.device().type() == TYPE;
}

void take_shape(const Tensor& t, const Tensor& from) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  t._set_conj(from.is_conj());
  t._set_neg(from.is_neg());
}

// One operation: its tensors on the host, and its results on the device.
struct Operation {
  std::optional<c10::Device> device;
  std::vector<std::pair<Tensor, Tensor>> given;  // on the device, on the host
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;  // of the device, by the host's

  // As CUDA does, unless both are for copies: a CPU tensor may be an index or a number.
  void check(const Tensor& t, bool number_allowed, bool index_allowed, const std::string& name) {
    if (!t.defined() || (t.is_cpu() && (index_allowed || (number_allowed && t.dim() == 0))))
      return;
    if (!device)
      device = t.device();
    TORCH_CHECK(
        *device == t.device(),
        "Expected all tensors to be on the same device, but found at least two devices, ",
        *device, " and ", t.device(), "! (when checking the arguments of ", name, ")");
  }

  c10::Storage host(const c10::Storage& storage) {
    if (storage.device_type() != TYPE)
      return storage;
    c10::Storage found = host_of(storage);
    storages.emplace(found.unsafeGetStorageImpl(), storage);
    return found;
  }

  Tensor host(const Tensor& t) {
    if (!is_here(t))
      return t;
    for (auto& [here, there] : given)
      if (here.is_same(t))
        return there;
    Tensor made;
    if (t.is_sparse()) {
      auto* impl = static_cast<at::SparseTensorImpl*>(t.unsafeGetTensorImpl());
      made = at::_sparse_coo_tensor_unsafe(
          host(impl->indices()), host(impl->values()), t.sizes(), t.scalar_type(), at::kSparse,
          at::kCPU, false, impl->coalesced());
    } else {
      made = at::detail::make_tensor<c10::TensorImpl>(
          host(t.storage()), c10::DispatchKeySet(DispatchKey::CPU), t.dtype());
      take_shape(made, t);
    }
    given.emplace_back(t, made);
    return made;
  }

  c10::Storage to_device(const c10::Storage& host) {
    auto& found = storages[host.unsafeGetStorageImpl()];
    if (!found)
      found = c10::Storage(
          c10::Storage::use_byte_size_t(), host.nbytes(), data_of(host, *device),
          c10::GetAllocator(TYPE), true);
    return found;
  }

  Tensor to_device(const Tensor& t) {
    if (!t.defined() || !t.is_cpu() || device->type() != TYPE)
      return t;
    for (auto& [here, there] : given)
      if (there.is_same(t))
        return here;
    if (t.is_sparse()) {
      auto made = at::detail::make_tensor<at::SparseTensorImpl>(
          c10::DispatchKeySet(DispatchKey::SparsePrivateUse1), t.dtype());
      take_parts(made, t);
      return made;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        to_device(t.storage()), c10::DispatchKeySet(DispatchKey::PrivateUse1), t.dtype());
    take_shape(made, t);
    return made;
  }

  void take_parts(const Tensor& t, const Tensor& from) {
    auto* theirs = static_cast<at::SparseTensorImpl*>(from.unsafeGetTensorImpl());
    auto* ours = static_cast<at::SparseTensorImpl*>(t.unsafeGetTensorImpl());
    ours->raw_resize_(theirs->sparse_dim(), theirs->dense_dim(), from.sizes());
    ours->set_indices_and_values_unsafe(to_device(theirs->indices()), to_device(theirs->values()));
    ours->set_coalesced(theirs->coalesced());
  }

  // What the operation has changed of the tensors that it was given: sizes, storages, memory.
  void finish() {
    for (auto& [_, storage] : storages)
      follow(storage);
    auto tensors = std::move(given);
    given.clear();
    for (auto& [here, there] : tensors) {
      if (here.is_sparse())
        continue;
      if (!there.storage().is_alias_of(host_of(here.storage())))
        here.unsafeGetTensorImpl()->set_storage_keep_dtype(to_device(there.storage()));
      if (here.sizes() != there.sizes() || here.strides() != there.strides() ||
          here.storage_offset() != there.storage_offset())
        take_shape(here, there);
    }
    for (auto& [here, there] : tensors)
      if (here.is_sparse())
        take_parts(here, there);
    given = std::move(tensors);
  }
};

using EachTensor = std::function<Tensor(const Tensor&)>;

void replace(c10::IValue& value, const EachTensor& f) {
  if (value.isTensor()) {
    value = f(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector())
      list.push_back(f(t));
    value = std::move(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(f(*t)) : std::nullopt);
    value = std::move(list);
  }
}

bool starts(const std::string& name, const char* with) {
  return name.rfind(with, 0) == 0;
}

// Runs an operation with the kernel of the CPU for this layout.
template <DispatchKey key>
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t count = schema.arguments().size();
  auto arguments = [&](size_t i) -> c10::IValue& { return stack->at(stack->size() - count + i); };
  // What CUDA moves to the device itself, and what it does not even for numbers.
  bool moves_indices = name == "aten::index" || starts(name, "aten::index_put") ||
      starts(name, "aten::_index_put") || starts(name, "aten::_unsafe_index");
  bool takes_numbers = !starts(name, "aten::_fused") && !starts(name, "aten::_amp");
  Operation now;
  for (size_t i = 0; i < count; ++i) {
    auto& value = arguments(i);
    const auto* alias = schema.arguments()[i].alias_info();
    bool written = alias && alias->isWrite();
    bool index = moves_indices && (value.isOptionalTensorList() || value.isTensorList());
    replace(value, [&](const Tensor& t) {
      now.check(t, takes_numbers && !written, index, name);
      return t;
    });
    if (value.isDevice() && value.toDevice().type() == TYPE) {
      now.device = with_index(value.toDevice());
      value = c10::Device(at::kCPU);
    }
  }
  if (!now.device)
    now.device = c10::Device(TYPE, current);
  for (size_t i = 0; i < count; ++i) {
    if (arguments(i).isStorage())
      arguments(i) = now.host(arguments(i).toStorage());
    replace(arguments(i), [&](const Tensor& t) { return now.host(t); });
  }
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  op.redispatchBoxed(c10::DispatchKeySet(key), stack);
  now.finish();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    replace(stack->at(i), [&](const Tensor& t) { return now.to_device(t); });
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Operation now;
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  Tensor target = now.host(to), source = now.host(from);
  // As they are, if that is possible: the CPU cannot copy every dtype.
  if (to.dtype() == from.dtype() && to.sizes() == from.sizes() && to.strides() == from.strides() &&
      to.is_non_overlapping_and_dense() && to.is_conj() == from.is_conj() &&
      to.is_neg() == from.is_neg())
    std::memmove(target.mutable_data_ptr(), source.const_data_ptr(), target.nbytes());
  else
    target.copy_(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  Operation now;
  for (const Tensor& t : {input, weight, bias.value_or(Tensor())})
    now.check(t, false, false, "convolution");
  auto host_bias = bias ? std::optional<Tensor>(now.host(*bias)) : std::nullopt;
  return now.to_device(at::convolution(
      now.host(input), now.host(weight), host_bias, stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  Operation now;
  for (const Tensor& t : {grad, input, weight})
    now.check(t, false, false, "convolution_backward");
  std::vector<int64_t> bias{grad.size(1)};
  auto [a, b, c] = at::convolution_backward(
      now.host(grad), now.host(input), now.host(weight), bias, stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {now.to_device(a), now.to_device(b), now.to_device(c)};
}

int64_t attention_by_plain_operations(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run<DispatchKey::CPU>>());
}

// A copy resolves these itself; torch would make it with another copy, and that with another.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run<DispatchKey::SparseCPU>>());
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  // Those with a kernel for all devices, which is for dense tensors.
  for (const char* name : {"is_coalesced", "sparse_dim", "dense_dim", "copy_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run<DispatchKey::SparseCPU>>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_fused_sdp_choice", &attention_by_plain_operations);
  // As one operation: with an output to write to, it warns.
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&run<DispatchKey::CPU>>());
}

}  // namespace
