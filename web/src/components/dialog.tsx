import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { t } from "../i18n";
import { Icon } from "./icons";

/** A native dialog: it keeps the focus, and Escape closes it. `side` for a panel at the edge. */
export function Dialog(props: {
  title: string;
  side?: boolean;
  onClose: () => void;
  children: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    dialog.current?.showModal();
  }, []);
  const beside = (event: MouseEvent) => {
    if (event.target === dialog.current) props.onClose();
  };
  return (
    <dialog
      ref={dialog}
      class={props.side ? "panel" : "dialog"}
      aria-label={props.title}
      onClose={props.onClose}
      onClick={beside}
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
