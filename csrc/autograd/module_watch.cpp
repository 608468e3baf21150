// SPDX-License-Identifier: Apache-2.0
// Whether module trees are still what they were. ModuleStructure of comet_ds/experts/structure.py
// asks about hundreds of modules in every forward.
//
// Python 3.12 tells of every change of a dictionary that is watched (PyDict_Watch): as long as none
// of the modules' has changed, the answer is known. After a change all modules are looked at, and
// with other versions always: older ones have no watchers, and 3.13 does not tell of an attribute
// that is set on an object whose values lie inline.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings.h"

namespace comet_ds {
namespace {

namespace py = pybind11;

#define COMET_HAS_DICT_WATCHERS (PY_VERSION_HEX >= 0x030C0000 && PY_VERSION_HEX < 0x030D0000)

#if COMET_HAS_DICT_WATCHERS

// Flags to raise when dictionaries change.
class DictWatcher {
  public:
    using Flag = std::shared_ptr<bool>;

    static DictWatcher& instance() {
        static auto* const watcher = new DictWatcher;  // outlives the interpreter's last change
        return *watcher;
    }

    // Returns whether the dictionary is watched: not where all of the interpreter's few watchers
    // are taken by others.
    bool watch(PyObject* dict, const Flag& flag) {
        if (id_ < 0 || PyDict_Watch(id_, dict) != 0) {
            PyErr_Clear();
            return false;
        }
        flags_.emplace(dict, flag);
        return true;
    }

    void forget(PyObject* dict, const Flag& flag) {
        const auto [begin, end] = flags_.equal_range(dict);
        for (auto found = begin; found != end; ++found) {
            if (found->second == flag) {
                flags_.erase(found);
                break;
            }
        }
        if (!flags_.contains(dict) && PyDict_Unwatch(id_, dict) != 0) PyErr_Clear();
    }

  private:
    DictWatcher() : id_(PyDict_AddWatcher(&DictWatcher::on_change)) {
        if (id_ < 0) PyErr_Clear();
    }

    static int on_change(PyDict_WatchEvent, PyObject* dict, PyObject*, PyObject*) {
        const auto [begin, end] = instance().flags_.equal_range(dict);
        for (auto found = begin; found != end; ++found) *found->second = true;
        return 0;
    }

    int id_;
    std::unordered_multimap<PyObject*, Flag> flags_;
};

#endif

class ModuleWatch {
  public:
    // `attributes`: the __dict__ of every module.
    explicit ModuleWatch(const std::vector<py::dict>& attributes) {
        for (const py::dict& found : attributes) {
            Module module{.attributes = found, .is_training = found["training"].ptr()};
            for (const char* name : kHooks) module.hooks.push_back(found[name]);
            module.children = found["_modules"];
            for (const auto& [name, child] : module.children) {
                module.children_then.emplace_back(py::reinterpret_borrow<py::object>(child));
            }
            if (found.contains("p")) module.p = found["p"];
            modules_.push_back(std::move(module));
        }
        watch();
    }
    ModuleWatch(const ModuleWatch&) = delete;
    ModuleWatch& operator=(const ModuleWatch&) = delete;

    ~ModuleWatch() {
#if COMET_HAS_DICT_WATCHERS
        for (PyObject* dict : watched_) DictWatcher::instance().forget(dict, has_changed_);
#endif
    }

    // Whether no module has hooks or a forward of its own, and all have the children, the mode and
    // the dropout probability that they had.
    bool is_unchanged() {
        if (is_watched_ && !*has_changed_) return true;
        *has_changed_ = false;
        const bool is_same = look();
        *has_changed_ |= !is_same;
        return is_same;
    }

  private:
    static constexpr const char* kHooks[] = {"_forward_hooks", "_forward_pre_hooks",
                                             "_backward_hooks", "_backward_pre_hooks"};

    struct Module {
        py::dict attributes;
        PyObject* is_training;  // True or False
        std::vector<py::object> hooks;
        py::dict children;
        std::vector<py::object> children_then;
        py::object p;
    };

    void watch() {
#if COMET_HAS_DICT_WATCHERS
        is_watched_ = true;
        const auto add = [this](const py::handle& dict) {
            if (DictWatcher::instance().watch(dict.ptr(), has_changed_)) {
                watched_.push_back(dict.ptr());
            } else {
                is_watched_ = false;
            }
        };
        for (const Module& module : modules_) {
            add(module.attributes);
            add(module.children);
            for (const py::object& hooks : module.hooks) add(hooks);
        }
#endif
    }

    bool look() const {
        for (const Module& module : modules_) {
            for (const py::object& hooks : module.hooks) {
                if (PyDict_GET_SIZE(hooks.ptr()) != 0) return false;
            }
            PyObject* attributes = module.attributes.ptr();
            if (PyDict_GetItem(attributes, forward_.ptr()) != nullptr) return false;
            if (PyDict_GetItem(attributes, training_.ptr()) != module.is_training) return false;
            if (module.p && PyDict_GetItem(attributes, p_.ptr()) != module.p.ptr()) return false;
            if (!has_same_children(module)) return false;
        }
        return true;
    }

    static bool has_same_children(const Module& module) {
        PyObject *children = module.children.ptr(), *child;
        if (size_t(PyDict_GET_SIZE(children)) != module.children_then.size()) return false;
        Py_ssize_t position = 0;
        for (size_t i = 0; PyDict_Next(children, &position, nullptr, &child); ++i) {
            if (child != module.children_then[i].ptr()) return false;
        }
        return true;
    }

    std::vector<Module> modules_;
    std::vector<PyObject*> watched_;  // dictionaries, which modules_ keeps alive
    std::shared_ptr<bool> has_changed_ = std::make_shared<bool>(true);
    bool is_watched_ = false;
    const py::str forward_{"forward"}, training_{"training"}, p_{"p"};
};

// Entries of dictionaries: whether all are still the objects they were.
class SlotWatch {
  public:
    using Slot = std::tuple<py::dict, py::str, py::object>;  // dictionary, key, value then

    explicit SlotWatch(std::vector<Slot> slots) : slots_(std::move(slots)) {}

    bool is_unchanged() const {
        for (const auto& [dict, key, value] : slots_) {
            if (PyDict_GetItem(dict.ptr(), key.ptr()) != value.ptr()) return false;
        }
        return true;
    }

  private:
    std::vector<Slot> slots_;
};

}  // namespace

void bind_module_watch(py::module_& m) {
    py::class_<SlotWatch>(m, "SlotWatch")
        .def(py::init<std::vector<SlotWatch::Slot>>())
        .def("is_unchanged", &SlotWatch::is_unchanged);
    py::class_<ModuleWatch>(m, "ModuleWatch")
        .def(py::init<const std::vector<py::dict>&>())
        .def("is_unchanged", &ModuleWatch::is_unchanged);
}

}  // namespace comet_ds
