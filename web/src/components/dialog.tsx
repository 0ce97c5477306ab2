import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { t } from "../i18n";
import { Icon } from "./icons";

function openPanels(): number {
  return history.state?.panels ?? 0;
}

/** On a phone, going back closes a panel, which covers the screen, rather than leave the view. */
function closeOnBack(onClose: () => void): (() => void) | undefined {
  if (!matchMedia("(hover: none)").matches) return undefined;
  const depth = openPanels() + 1; // a panel may open another
  history.pushState({ panels: depth }, "");
  const onPop = () => openPanels() < depth && onClose();
  addEventListener("popstate", onPop);
  return () => {
    removeEventListener("popstate", onPop);
    if (openPanels() === depth) history.back(); // closed in another way
  };
}

const FOCUSABLE =
  "button:not(:disabled), input:not(:disabled), select, textarea, a[href], summary, [tabindex='0']";

/** A native modal dialog: it traps the focus, and Escape closes it. `side`: a panel at the edge. */
export function Dialog(props: {
  title: string;
  side?: boolean;
  onClose: () => void;
  children: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  const unmounted = useRef(false);
  const pressed = useRef<EventTarget | null>(null);
  useLayoutEffect(() => {
    const { current: element } = dialog;
    element?.showModal();
    // Removing an open dialog without closing it would lose the focus.
    return () => {
      unmounted.current = true;
      element?.close();
    };
  }, []);
  useEffect(() => (props.side ? closeOnBack(props.onClose) : undefined), []);
  // Browsers let the focus leave a modal dialog for their own controls: keep it, as panels of text do.
  const onTab = (event: KeyboardEvent) => {
    if (event.key !== "Tab") return;
    const all = [...dialog.current!.querySelectorAll<HTMLElement>(FOCUSABLE)].filter((each) => each.offsetParent);
    const [from, to] = event.shiftKey ? [all[0], all.at(-1)] : [all.at(-1), all[0]];
    if (document.activeElement !== from && dialog.current!.contains(document.activeElement)) return;
    event.preventDefault();
    to?.focus();
  };
  const onBackdropClick = (event: MouseEvent) => {
    // Only if pressed there too: a text selection may end outside the dialog.
    const { current: element } = dialog;
    if (event.target === element && pressed.current === element) props.onClose();
  };
  return (
    <dialog
      ref={dialog}
      class={props.side ? "panel" : "dialog"}
      aria-label={props.title}
      onKeyDown={onTab}
      onClose={() => unmounted.current || props.onClose()}
      onPointerDown={(event) => (pressed.current = event.target)}
      onClick={onBackdropClick}
    >
      <div class="dialog-inner">
        <header>
          <h2>{props.title}</h2>
          <button type="button" class="quiet" aria-label={t("close")} onClick={props.onClose}>
            <Icon name="close" />
          </button>
        </header>
        {props.children}
      </div>
    </dialog>
  );
}
