// A device that is none: PyTorch's extension point for devices, over memory of the host.
//
// Operations compute at once, in the order in which the host asks for them. Beside that every stream, event and wait is followed by vector
// clocks, as a race detector does: two accesses to the same bytes, one of them a write, whose order no stream, event or wait forces are an
// error, whatever order a card would happen to take. So one run stands for all orders.
//
//   memory      is filled with ones' bits (NaN) when it is allocated. It may be reused by its own stream the moment that it is freed: a use on
//               another stream, which neither that stream has waited for nor record_stream has told of, is an error.
//   mixing      a tensor of the host in an operation of the device is an error, unless it is a single number.
//   copies      to pinned memory that nobody waits for do not arrive before the host has waited; pinned memory that is written
//               before a copy from it is known to be over is an error.
//   collectives run on a stream of their own, as NCCL's do, behind what the current stream has been asked for.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
using Clock = std::vector<uint64_t>;

void join(Clock& mine, const Clock& other) {
  if (mine.size() < other.size()) mine.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

struct Moment {
  size_t stream = 0;
  uint64_t count = 0;
  bool before(const Clock& clock) const { return stream < clock.size() && clock[stream] >= count; }
};

struct Access {
  size_t begin, end;
  Moment at;
  bool writes;
  std::string by;
};

struct Block {
  size_t size;
  size_t stream;  // which allocated it
  std::vector<Access> accesses;
  std::set<size_t> recorded;
};

struct Arriving {  // a copy to pinned memory that nobody has waited for
  at::Tensor to, values;
  Moment at;
};

struct Leaving {  // a copy from pinned memory that may still be read
  at::Tensor from, values;
  Moment at;
};

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point time;
};

struct Device {
  std::recursive_mutex mutex;
  std::vector<Clock> streams{Clock(1, 0)};
  Clock host;
  std::map<char*, Block> blocks;
  std::map<char*, size_t> pinned;
  std::vector<Arriving> arriving;
  std::vector<Leaving> leaving;
  std::vector<std::string> errors;  // of what must not throw: destructors
  int64_t operations = 0;
  int64_t allocated = 0, peak = 0;  // bytes
};

Device& device() {
  static Device* made = new Device;
  return *made;
}
thread_local size_t current = 0;

using Lock = std::lock_guard<std::recursive_mutex>;

void (*tell_of_wait)() = nullptr;
thread_local bool has_waited = false;

// Stands before a Lock: who is told takes Python's lock, whose holder may wait for the device's.
struct Telling {
  ~Telling() {
    if (has_waited && tell_of_wait) tell_of_wait();
    has_waited = false;
  }
};

Moment tick(size_t stream) {
  auto& clock = device().streams[stream];
  join(clock, device().host);
  if (clock.size() <= stream) clock.resize(stream + 1, 0);
  return {stream, ++clock[stream]};
}

void told() {
  auto errors = std::move(device().errors);
  device().errors.clear();
  TORCH_CHECK(errors.empty(), errors.empty() ? "" : errors.front());
}

std::string race(const std::string& now, size_t stream, const Access& before) {
  std::ostringstream text;
  text << "race: " << now << " on stream " << stream << " and " << before.by << " on stream " << before.at.stream
       << " are in no order";
  return text.str();
}

Block* block_of(const char* at, char** begin = nullptr) {
  auto& blocks = device().blocks;
  auto found = blocks.upper_bound(const_cast<char*>(at));
  if (found == blocks.begin()) return nullptr;
  --found;
  if (at >= found->first + std::max<size_t>(found->second.size, 1)) return nullptr;
  if (begin) *begin = found->first;
  return &found->second;
}

void touch(const at::Tensor& tensor, bool writes, const Moment& now, const std::string& by) {
  if (tensor.numel() == 0 || !tensor.has_storage()) return;
  char* base = nullptr;
  auto* first = static_cast<const char*>(tensor.unsafeGetTensorImpl()->unsafe_storage().data());
  if (!first) return;
  first += tensor.storage_offset() * tensor.itemsize();
  Block* block = block_of(first, &base);
  if (!block) return;
  size_t extent = tensor.itemsize();
  for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d) * tensor.itemsize();
  const size_t begin = first - base, end = begin + extent;
  const auto& clock = device().streams[now.stream];
  std::vector<Access> kept;
  for (auto& access : block->accesses) {
    const bool overlaps = access.begin < end && begin < access.end;
    const bool ordered = access.at.before(clock);
    if (overlaps && (writes || access.writes))
      TORCH_CHECK(ordered, race(by, now.stream, access));
    const bool covered = overlaps && begin <= access.begin && access.end <= end && ordered && (writes || !access.writes);
    if (!covered) kept.push_back(std::move(access));
  }
  kept.push_back({begin, end, now, writes, by});
  block->accesses = std::move(kept);
}

bool overlap(const at::Tensor& one, const at::Tensor& other) {
  auto* first = static_cast<const char*>(one.data_ptr());
  auto* second = static_cast<const char*>(other.data_ptr());
  return first < second + other.nbytes() && second < first + one.nbytes();
}

// The host has come to what `clock` has: copies that are over arrive.
void host_waits(const Clock& clock) {
  auto& it = device();
  for (size_t i = 0; i < clock.size(); ++i)
    if (clock[i] > (i < it.host.size() ? it.host[i] : 0)) {  // it has not come there yet
      has_waited = true;
      break;
    }
  join(it.host, clock);
  std::vector<Arriving> later;
  for (auto& one : it.arriving) {
    if (one.at.before(it.host)) one.to.copy_(one.values);
    else later.push_back(std::move(one));
  }
  it.arriving = std::move(later);
  std::vector<Leaving> going;
  for (auto& one : it.leaving) {
    TORCH_CHECK(at::equal(one.from.reshape({-1}).view(at::kByte), one.values.reshape({-1}).view(at::kByte)),
                "race: pinned memory was written before a copy from it was over");
    if (!one.at.before(it.host)) going.push_back(std::move(one));
  }
  it.leaving = std::move(going);
}

// --- memory -------------------------------------------------------------------------------------------------------------------------

void release(void* memory) {
  if (!memory) return;
  Lock lock(device().mutex);
  auto& blocks = device().blocks;
  auto found = blocks.find(static_cast<char*>(memory));
  if (found != blocks.end()) {
    auto& block = found->second;
    Clock owner = device().streams[block.stream];
    join(owner, device().host);  // what the host has waited for is over before whatever it asks for next
    for (auto& access : block.accesses)
      if (!access.at.before(owner) && !block.recorded.count(access.at.stream))
        device().errors.push_back(race("a reuse of freed memory", block.stream, access));
    device().allocated -= block.size;
    blocks.erase(found);
  }
  std::free(memory);
}

struct Memory final : public c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Lock lock(device().mutex);
    void* memory = nullptr;
    if (size) {
      TORCH_CHECK(!posix_memalign(&memory, 64, size), "out of memory");
      std::memset(memory, 0xff, size);
      device().blocks[static_cast<char*>(memory)] = Block{size, current, {}, {}};
      device().allocated += size;
      device().peak = std::max(device().peak, device().allocated);
    }
    return {memory, memory, &release, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;

void unpin(void* memory) {
  if (!memory) return;
  Lock lock(device().mutex);
  device().pinned.erase(static_cast<char*>(memory));
  std::free(memory);
}

struct PinnedMemory final : public c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Lock lock(device().mutex);
    void* memory = nullptr;
    if (size) {
      TORCH_CHECK(!posix_memalign(&memory, 64, size), "out of memory");
      std::memset(memory, 0xff, size);
      device().pinned[static_cast<char*>(memory)] = size;
    }
    return {memory, memory, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* at) {
  Lock lock(device().mutex);
  auto& pinned = device().pinned;
  auto found = pinned.upper_bound(static_cast<char*>(const_cast<void*>(at)));
  if (found == pinned.begin()) return false;
  --found;
  return static_cast<const char*>(at) < found->first + found->second;
}

// --- streams, events, the device ----------------------------------------------------------------------------------------------------

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return {kDevice, 0}; }
  c10::Device getDevice() const override { return {kDevice, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream stream(size_t number) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, 0), static_cast<c10::StreamId>(number)); }
  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(device().mutex);
    device().streams.emplace_back();
    return stream(device().streams.size() - 1);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    auto before = stream(current);
    current = to.id();
    return before;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(device().mutex);
    if (!*event) *event = new Event;
    tick(stream.id());
    *static_cast<Event*>(*event) = Event{device().streams[stream.id()], std::chrono::steady_clock::now()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock lock(device().mutex);
    if (event) join(device().streams[stream.id()], static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {
    Lock lock(device().mutex);
    if (!event) return true;
    auto& clock = static_cast<Event*>(event)->clock;
    for (size_t i = 0; i < clock.size(); ++i)
      if (clock[i] > (i < device().host.size() ? device().host[i] : 0)) return false;
    return true;
  }
  void synchronizeEvent(void* event) const override {
    Telling telling;
    Lock lock(device().mutex);
    if (event) host_waits(Clock(static_cast<Event*>(event)->clock));
  }
  bool queryStream(const c10::Stream&) const override { return false; }
  void synchronizeStream(const c10::Stream& stream) const override {
    Telling telling;
    Lock lock(device().mutex);
    host_waits(Clock(device().streams[stream.id()]));
    told();
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Telling telling;
    Lock lock(device().mutex);
    Clock all;
    for (auto& clock : device().streams) join(all, clock);
    host_waits(all);
    told();
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(begin && end, "the time of an event that was never recorded");
    auto passed = static_cast<Event*>(end)->time - static_cast<Event*>(begin)->time;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Lock lock(device().mutex);
    if (auto* block = block_of(static_cast<const char*>(data.get()))) block->recorded.insert(stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : public at::PrivateUse1HooksInterface {
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Device getDeviceFromPtr(void*) const override { return {kDevice, 0}; }
};

// --- operations ---------------------------------------------------------------------------------------------------------------------

bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

// The same bytes as a tensor of the host.
at::Tensor host_of(const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  auto& storage = impl->unsafe_storage();
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), nullptr, false);
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor fresh(const at::Tensor& computed) {
  at::Tensor made = at::detail::empty_strided_generic(
      computed.sizes(), computed.strides(), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), computed.scalar_type());
  if (computed.numel()) host_of(made).copy_(computed);
  return made;
}

struct Given {
  at::Tensor ours, host;
  bool writes;
};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Lock lock(device().mutex);
  told();
  const auto& schema = op.schema();
  const auto name = schema.operator_name().name;
  const auto count = schema.arguments().size();
  std::vector<Given> given;
  auto begin = stack->end() - count;
  std::vector<std::string> of_host;
  auto changed = [&](const at::Tensor& tensor, bool writes) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    if (!is_ours(tensor)) {
      if (tensor.dim() > 0) of_host.push_back(name);
      return tensor;
    }
    at::Tensor host = tensor.numel() == 0 && writes ? at::empty(tensor.sizes(), tensor.options().device(at::kCPU)) : host_of(tensor);
    given.push_back(Given{tensor, host, writes});
    return host;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = *(begin + i);
    auto* info = schema.arguments()[i].alias_info();
    const bool writes = info && info->isWrite();
    if (value.isTensor()) {
      value = changed(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(changed(tensor, writes));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(changed(*tensor, writes)) : tensor);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      value = c10::IValue(c10::Device(c10::kCPU));
    }
  }
  TORCH_CHECK(of_host.empty(), "a tensor of the host in ", name, ", an operation of the device");
  ++device().operations;
  const auto now = tick(current);
  for (auto& one : given) touch(one.ours, one.writes, now, name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& one : given)
    if (one.writes && one.host.sizes() != one.ours.sizes()) {
      at::native::resize_(one.ours, one.host.sizes());
      if (one.host.numel()) host_of(one.ours).copy_(one.host);
      touch(one.ours, true, now, name);
    }
  auto returned = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (auto& one : given)
      if (one.host.is_same(tensor)) return one.ours;
    for (auto& one : given)
      if (tensor.has_storage() && tensor.storage().data() && one.host.storage().data() == tensor.storage().data())
        return at::native::as_strided_tensorimpl(one.ours, tensor.sizes(), tensor.strides(), tensor.storage_offset());
    auto made = fresh(tensor);
    touch(made, true, now, name);
    return made;
  };
  auto results = schema.returns().size();
  for (auto value = stack->end() - results; value != stack->end(); ++value) {
    if (value->isTensor()) {
      *value = returned(value->toTensor());
    } else if (value->isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value->toTensorVector()) list.push_back(returned(tensor));
      *value = list;
    }
  }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }
at::Tensor& set_storage(at::Tensor& self, at::Storage source) { return at::native::set_(self, source); }
at::Tensor& set_place(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (self.numel() == 0) return to;
  Telling telling;
  Lock lock(device().mutex);
  told();
  ++device().operations;
  const auto now = tick(current);
  auto& clock = device().streams[current];
  if (is_ours(self) && is_ours(to)) {
    touch(self, false, now, "copy");
    touch(to, true, now, "copy");
    host_of(to).copy_(host_of(self));
  } else if (is_ours(to)) {
    auto& arriving = device().arriving;
    for (auto one = arriving.begin(); one != arriving.end();) {
      if (!overlap(one->to, self)) { ++one; continue; }
      TORCH_CHECK(one->at.before(clock), "race: a copy from pinned memory before the one to it is known to be over");
      one->to.copy_(one->values);
      one = arriving.erase(one);
    }
    touch(to, true, now, "copy from the host");
    host_of(to).copy_(self);
    if (non_blocking && is_pinned(self.data_ptr())) device().leaving.push_back(Leaving{self.detach(), self.clone(), now});
    else host_waits(Clock(clock));
  } else {
    touch(self, false, now, "copy to the host");
    if (non_blocking && is_pinned(to.data_ptr())) {
      // Behind a copy from the same memory, in the order of the streams.
      auto& leaving = device().leaving;
      for (auto one = leaving.begin(); one != leaving.end();) {
        if (!overlap(one->from, to)) { ++one; continue; }
        TORCH_CHECK(one->at.before(clock), "race: a copy to pinned memory before the one from it is known to be over");
        one = leaving.erase(one);
      }
      at::Tensor values = host_of(self).clone();
      at::Tensor there = to.detach();
      std::memset(there.data_ptr(), 0xff, there.is_contiguous() ? there.nbytes() : there.itemsize());
      device().arriving.push_back(Arriving{there, values, now});
    } else {
      const_cast<at::Tensor&>(to).copy_(host_of(self));
      host_waits(Clock(clock));
    }
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  at::native::resize_(to, self.sizes());
  return copy_from(self, to, false);
}

bool is_exchangeable(const at::Tensor& self, const at::Tensor& from) { return true; }

at::Scalar number(const at::Tensor& self) {
  Telling telling;
  Lock lock(device().mutex);
  told();
  touch(self, false, tick(current), "item");
  host_waits(Clock(device().streams[current]));
  return host_of(self).item();
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  Lock lock(device().mutex);
  if (!self.has_storage() || !self.storage().data()) return;
  if (auto* block = block_of(static_cast<const char*>(self.storage().data()))) block->recorded.insert(stream.id());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("resize_", &resize_);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_place);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number);
  m.impl("_has_compatible_shallow_copy_type", &is_exchangeable);  // of the tensors that `data` is set to
  m.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

// --- collectives --------------------------------------------------------------------------------------------------------------------

struct Collective final : public c10d::Work {
  Collective(Clock clock, std::vector<at::Tensor> tensors) : clock(std::move(clock)), tensors(std::move(tensors)) {}
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override {
    Lock lock(device().mutex);
    join(device().streams[current], clock);
    tensors.clear();  // as NCCL's work, which holds them until somebody waits
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  Clock clock;
  std::vector<at::Tensor> tensors;
};

size_t stream_of(const c10d::ProcessGroup* group) {
  static std::map<const c10d::ProcessGroup*, size_t> streams;
  auto found = streams.find(group);
  if (found == streams.end()) {
    device().streams.emplace_back();
    found = streams.emplace(group, device().streams.size() - 1).first;
  }
  return found->second;
}

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Works = c10::intrusive_ptr<c10d::Work>;

// `how` runs over tensors of the host: what is read, and what is written.
template <typename How>
Works collective(const Group& group, at::TensorList reads, at::TensorList writes, const std::string& name, How how) {
  Moment now;
  size_t stream;
  std::vector<at::Tensor> from, to, held;
  {
    Lock lock(device().mutex);
    told();
    stream = stream_of(group.get());
    tick(current);
    join(device().streams[stream], device().streams[current]);
    now = tick(stream);
    for (auto& tensor : reads) { touch(tensor, false, now, name); from.push_back(host_of(tensor)); held.push_back(tensor); }
    for (auto& tensor : writes) { touch(tensor, true, now, name); to.push_back(host_of(tensor)); held.push_back(tensor); }
  }
  how(group->getBackend(c10::kCPU), from, to)->wait();
  Lock lock(device().mutex);
  return c10::make_intrusive<Collective>(device().streams[stream], std::move(held));
}

std::tuple<at::Tensor, Works> allgather_base(at::Tensor& out, at::Tensor& in, const Group& group, bool async, int64_t timeout) {
  auto work = collective(group, {in}, {out}, "all-gather", [](auto backend, auto& from, auto& to) {
    return backend->_allgather_base(to[0], from[0], c10d::AllgatherOptions{});
  });
  return {out, work};
}

Works allgather_coalesced(at::TensorList outs, at::TensorList ins, const Group& group, bool async) {
  return collective(group, ins, outs, "all-gather", [](auto backend, auto& from, auto& to) {
    Works last;
    for (size_t i = 0; i < from.size(); ++i) {
      last = backend->_allgather_base(to[i], from[i], c10d::AllgatherOptions{});
      if (i + 1 < from.size()) last->wait();
    }
    return last;
  });
}

std::tuple<std::vector<at::Tensor>, Works> allreduce(at::TensorList tensors, const Group& group,
                                                     const c10::intrusive_ptr<c10d::ReduceOp>& op,
                                                     const std::optional<at::Tensor>& sparse, bool async, int64_t timeout) {
  auto work = collective(group, {}, tensors, "all-reduce", [&](auto backend, auto&, auto& to) {
    c10d::AllreduceOptions options;
    options.reduceOp = *op;
    return backend->allreduce(to, options);
  });
  return {tensors.vec(), work};
}

std::tuple<at::Tensor, Works> reduce_scatter_base(at::Tensor& out, at::Tensor& in, const Group& group,
                                                  const c10::intrusive_ptr<c10d::ReduceOp>& op, bool async, int64_t timeout) {
  auto work = collective(group, {in}, {out}, "reduce-scatter", [&](auto backend, auto& from, auto& to) {
    auto whole = from[0].clone();
    std::vector<at::Tensor> every{whole};
    c10d::AllreduceOptions options;
    options.reduceOp = *op;
    auto done = backend->allreduce(every, options);
    done->wait();
    to[0].copy_(whole.view(-1).narrow(0, group->getRank() * to[0].numel(), to[0].numel()).view_as(to[0]));
    return done;
  });
  return {out, work};
}

std::tuple<std::vector<at::Tensor>, Works> broadcast(at::TensorList tensors, const Group& group, int64_t root, int64_t of, bool async,
                                                     int64_t timeout) {
  auto work = collective(group, {}, tensors, "broadcast", [&](auto backend, auto&, auto& to) {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.rootTensor = of;
    return backend->broadcast(to, options);
  });
  return {tensors.vec(), work};
}

std::tuple<std::vector<std::vector<at::Tensor>>, Works> allgather(const std::vector<std::vector<at::Tensor>>& outs, at::TensorList ins,
                                                                  const Group& group, bool async, int64_t timeout) {
  auto work = collective(group, ins, outs[0], "all-gather", [](auto backend, auto& from, auto& to) {
    std::vector<std::vector<at::Tensor>> lists{to};
    return backend->allgather(lists, from, c10d::AllgatherOptions{});
  });
  return {outs, work};
}

Works alltoall_base(at::Tensor& out, at::Tensor& in, const Group& group, std::vector<int64_t> outs, std::vector<int64_t> ins, bool async,
                    int64_t timeout) {
  return collective(group, {in}, {out}, "all-to-all", [&](auto backend, auto& from, auto& to) {
    return backend->alltoall_base(to[0], from[0], outs, ins, c10d::AllToAllOptions{});
  });
}

TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  m.impl("alltoall_base_", &alltoall_base);
  m.impl("_allgather_base_", &allgather_base);
  m.impl("allgather_into_tensor_coalesced_", &allgather_coalesced);
  m.impl("allreduce_", &allreduce);
  m.impl("_reduce_scatter_base_", &reduce_scatter_base);
  m.impl("broadcast_", &broadcast);
  m.impl("allgather_", &allgather);
}

int64_t operations() { return device().operations; }
void finish() { Guard().synchronizeDevice(0); }

// The most bytes that were allocated since the last call, and how many are now.
std::tuple<int64_t, int64_t> peak() {
  Lock lock(device().mutex);
  return {std::exchange(device().peak, device().allocated), device().allocated};
}

TORCH_LIBRARY(pretended, m) {
  m.def("operations() -> int", &operations);
  m.def("finish() -> ()", &finish);
  m.def("peak() -> (int, int)", &peak);
}

struct Registered {
  Registered() {
    c10::SetAllocator(kDevice, &memory);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
  }
} registered;

}  // namespace

// `called` is called whenever the host waits for what has not come yet.
extern "C" void pretended_tell_of_waits(void (*called)()) { tell_of_wait = called; }
