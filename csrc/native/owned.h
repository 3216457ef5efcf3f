// What is too large for a thread's stack.
#pragma once

namespace ct::native {

// (Without <memory>: a compiler takes longer to read that than for a small field.)
template <class T>
class Owned {
 public:
  template <class... Args>
  explicit Owned(Args&&... args) : held(new T(static_cast<Args&&>(args)...)) {}
  ~Owned() { delete held; }

  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  T* operator->() const { return held; }

 private:
  T* const held;
};

}  // namespace ct::native
